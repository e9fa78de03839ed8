//! A thread of the library's own, which does whatever a filter on the VMM's threads might forbid.
//!
//! There are two, one for the engine's runs and one for what is quick. Each is started at the first call that only KVM's
//! users make, when the thread at hand has just opened `/dev/kvm`. It blocks every signal, so that none of the VMM's is
//! handled here. Threads of the VMM hand it work and wait; that takes a lock and a condition variable, and so no system
//! call but `futex`.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::process::panic_text;
use crate::seccomp::Look;
use crate::signals;

/// Why work was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// The library's thread is confined by seccomp.
    Confined,
    /// It panicked, with this message.
    Panicked(String),
    /// It took too long; it may still be done.
    Late,
}

/// What a user lets the thread do when it is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenConfined {
    Refuse,
    Work,
}

type Job = Box<dyn FnOnce(Result<(), Undone>) + Send>;

/// The thread's way in. When it is dropped, the thread ends after the work it has.
#[derive(Debug)]
pub(crate) struct Helper(Arc<Queue>);

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Helper {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where the process may have no more threads.
    pub(crate) fn start(when_confined: WhenConfined) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let theirs = Arc::clone(&queue);
        // A thread inherits its signal mask.
        let _blocked = signals::block_all();
        std::thread::Builder::new().name("premap".to_owned()).spawn(move || {
            let mut look = Look::new();
            while let Some(job) = theirs.next() {
                // Where it can't be told, nothing is risked.
                let confined = when_confined == WhenConfined::Refuse && look.is_confined().unwrap_or(true);
                job(if confined { Err(Undone::Confined) } else { Ok(()) });
            }
        })?;
        Ok(Self(queue))
    }

    /// Has `work` done on the thread, and waits for it, for at most `limit` if there is one.
    ///
    /// # Errors
    /// Why it was not done.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        limit: Option<Duration>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Undone> {
        let answer = Arc::new((Mutex::new(None), Condvar::new()));
        let theirs = Arc::clone(&answer);
        let job = move |may: Result<(), Undone>| {
            let result = may.and_then(|()| {
                catch_unwind(AssertUnwindSafe(work)).map_err(|panic| Undone::Panicked(panic_text(&*panic)))
            });
            *theirs.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            theirs.1.notify_all();
        };
        self.0.lock().jobs.push_back(Box::new(job));
        self.0.filled.notify_one();
        let (slot, given) = &*answer;
        let guard = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = limit.unwrap_or(Duration::MAX);
        let (mut guard, _) = given
            .wait_timeout_while(guard, limit, |answer| answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        guard.take().unwrap_or(Err(Undone::Late))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.filled.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper() -> Helper {
        Helper::start(WhenConfined::Work).unwrap()
    }

    #[test]
    fn work_is_done_on_a_thread_of_its_own_and_its_value_comes_back() {
        let here = std::thread::current().id();
        let there = helper().ask(None, || std::thread::current().id()).unwrap();
        assert_ne!(here, there);
    }

    #[test]
    fn a_panic_is_told_and_the_thread_goes_on() {
        let helper = helper();
        let undone = helper.ask(None, || -> u8 { panic!("number {}", 7) });
        assert_eq!(undone, Err(Undone::Panicked("number 7".to_owned())));
        assert_eq!(helper.ask(None, || 1), Ok(1));
    }

    #[test]
    fn a_wait_ends_at_its_limit() {
        let late =
            helper().ask(Some(Duration::from_millis(1)), || std::thread::sleep(Duration::from_millis(300)));
        assert_eq!(late, Err(Undone::Late));
    }

    #[test]
    fn the_thread_takes_no_signals() {
        let status =
            helper().ask(None, || std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        // SIGINT, SIGUSR1, SIGALRM and SIGTERM.
        let wanted = 1 << 1 | 1 << 9 | 1 << 13 | 1 << 14;
        assert_eq!(u64::from_str_radix(blocked.trim(), 16).unwrap() & wanted, wanted);
    }
}
