//! A thread of the library's own, which does whatever a filter on the VMM's threads might forbid.
//!
//! There are two, one for the engine's runs and one for what is quick. Each is started at the first call that only KVM's
//! users make, when the thread at hand has just opened `/dev/kvm`. Only the first ends when it is idle, and the second starts
//! it again when another VM is made. Each blocks every signal, so that none of the VMM's is handled here. Threads of the VMM hand it work, and wait where they must; that
//! takes a lock and a condition variable, and so no system call but `futex`.
//!
//! A thread ends once nothing more is to come: that is for its user to say, who is asked whenever it was idle for a while.

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::process::panic_text;
use crate::seccomp::Look;
use crate::signals;

/// How long a thread waits for more work before it asks whether there will be any.
const IDLE: Duration = Duration::from_secs(1);

thread_local! {
    static OWN: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is one of the library's own.
pub(crate) fn is_own_thread() -> bool {
    OWN.get()
}

/// Why work was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// The library's thread is confined by seccomp.
    Confined,
    /// It can't be told whether it is.
    MaybeConfined,
    /// It panicked, with this message.
    Panicked(String),
    /// It took too long; it may still be done.
    Late,
    /// There is no thread any more.
    Ended,
}

/// What a user lets the thread do when it is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenConfined {
    Refuse,
    Work,
}

type Job = Box<dyn FnOnce(Result<(), Undone>) + Send>;

/// For how much longer a thread may be needed; zero where it is not.
type Needed = fn() -> Duration;

/// The thread's way in. When it is dropped, the thread ends after the work it has.
#[derive(Debug)]
pub(crate) struct Helper {
    queue: Arc<Queue>,
    when_confined: WhenConfined,
    needed: Needed,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    /// There is work, or none is to come, or the thread has ended.
    turned: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    running: bool,
    closed: bool,
    /// The thread that there is, or was last.
    id: Option<rustix::thread::Pid>,
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

    /// The next piece of work; none where the thread is to end.
    fn next(&self, needed: Needed) -> Option<Job> {
        let mut patience = IDLE;
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed || patience.is_zero() {
                // Said under the lock under which work is handed over: none is handed to a thread that ends.
                state.running = false;
                self.turned.notify_all();
                return None;
            }
            let (waited, timeout) =
                self.turned.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
            state = waited;
            if timeout.timed_out() && state.jobs.is_empty() {
                // Its user takes locks of its own.
                drop(state);
                patience = needed();
                state = self.lock();
            }
        }
    }

    fn work(&self, when_confined: WhenConfined, needed: Needed) {
        OWN.set(true);
        self.lock().id = Some(rustix::thread::gettid());
        let mut look = Look::new();
        while let Some(job) = self.next(needed) {
            // Where it can't be told, nothing is risked.
            let may = match (when_confined, look.is_confined()) {
                (WhenConfined::Work, _) | (_, Some(false)) => Ok(()),
                (_, Some(true)) => Err(Undone::Confined),
                (_, None) => Err(Undone::MaybeConfined),
            };
            // What fails in a job, the job tells.
            let _ = catch_unwind(AssertUnwindSafe(|| job(may)));
        }
    }
}

impl Helper {
    /// A helper without a thread so far. `needed` says for how long one that is idle may be needed still.
    pub(crate) fn new(when_confined: WhenConfined, needed: Needed) -> Self {
        Self { queue: Arc::default(), when_confined, needed }
    }

    /// Starts the thread, unless it is there.
    ///
    /// # Errors
    /// Where the process may have no more threads.
    pub(crate) fn start(&self) -> std::io::Result<()> {
        let mut state = self.queue.lock();
        if state.running || state.closed {
            return Ok(());
        }
        let (queue, when_confined, needed) = (Arc::clone(&self.queue), self.when_confined, self.needed);
        // A thread inherits its signal mask.
        let _blocked = signals::block_all();
        std::thread::Builder::new()
            .name("premap".to_owned())
            .spawn(move || queue.work(when_confined, needed))?;
        state.running = true;
        Ok(())
    }

    /// Whether the thread is there.
    pub(crate) fn is_running(&self) -> bool {
        self.queue.lock().running
    }

    /// Hands over a job, which is told whether it may do its work.
    ///
    /// # Errors
    /// Where there is no thread any more; the job is dropped.
    pub(crate) fn hand(&self, job: impl FnOnce(Result<(), Undone>) + Send + 'static) -> Result<(), Undone> {
        self.hand_or_keep(job).map_or(Ok(()), |_| Err(Undone::Ended))
    }

    /// Hands over a job, as [`hand`](Self::hand) does; gives it back where there is no thread any more.
    pub(crate) fn hand_or_keep<J>(&self, job: J) -> Option<J>
    where
        J: FnOnce(Result<(), Undone>) + Send + 'static,
    {
        let mut state = self.queue.lock();
        if !state.running || state.closed {
            return Some(job);
        }
        state.jobs.push_back(Box::new(job));
        drop(state);
        self.queue.turned.notify_all();
        None
    }

    /// Has `work` done on the thread, and waits for it, for at most `limit`.
    ///
    /// # Errors
    /// Why it was not done.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Undone> {
        let answer = Arc::new((Mutex::new(None), Condvar::new()));
        let theirs = Arc::clone(&answer);
        self.hand(move |may| {
            let result = attempt(may, work);
            *theirs.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            theirs.1.notify_all();
        })?;
        let (slot, given) = &*answer;
        let guard = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut guard, _) = given
            .wait_timeout_while(guard, limit, |answer| answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        guard.take().unwrap_or(Err(Undone::Late))
    }

    /// Lets the thread end after the work it has. It is not started again.
    pub(crate) fn close(&self) {
        self.queue.lock().closed = true;
        self.queue.turned.notify_all();
    }

    /// Waits until the thread that was told to end is gone, for at most `limit`: it counts against the process's limit for a
    /// moment after its work. To be called on a thread that may open files.
    pub(crate) fn wait_until_gone(&self, limit: Duration) {
        let until = Instant::now() + limit;
        self.wait_for_end(limit);
        let Some(id) = self.queue.lock().id else { return };
        let path = format!("/proc/self/task/{}/stat", id.as_raw_nonzero());
        // Without /proc it can't be told.
        while std::fs::File::open(&path).is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a thread that was told to end has done its work, for at most `limit`.
    pub(crate) fn wait_for_end(&self, limit: Duration) {
        let state = self.queue.lock();
        let waited = self.queue.turned.wait_timeout_while(state, limit, |state| state.running);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Does work that may be done, and catches its panic.
///
/// # Errors
/// Why it was not done.
pub(crate) fn attempt<T>(may: Result<(), Undone>, work: impl FnOnce() -> T) -> Result<T, Undone> {
    may.and_then(|()| {
        catch_unwind(AssertUnwindSafe(work)).map_err(|panic| Undone::Panicked(panic_text(&*panic)))
    })
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn helper() -> Helper {
        let helper = Helper::new(WhenConfined::Work, || LIMIT);
        helper.start().unwrap();
        helper
    }

    #[test]
    fn work_is_done_on_a_thread_of_its_own_and_its_value_comes_back() {
        let here = std::thread::current().id();
        let there = helper().ask(LIMIT, || std::thread::current().id()).unwrap();
        assert_ne!(here, there);
    }

    #[test]
    fn a_panic_is_told_and_the_thread_goes_on() {
        let helper = helper();
        let undone = helper.ask(LIMIT, || -> u8 { panic!("number {}", 7) });
        assert_eq!(undone, Err(Undone::Panicked("number 7".to_owned())));
        assert_eq!(helper.ask(LIMIT, || 1), Ok(1));
    }

    #[test]
    fn a_wait_ends_at_its_limit() {
        let late = helper().ask(Duration::from_millis(1), || std::thread::sleep(Duration::from_millis(300)));
        assert_eq!(late, Err(Undone::Late));
    }

    #[test]
    fn the_thread_takes_no_signals() {
        let status =
            helper().ask(LIMIT, || std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        // SIGINT, SIGUSR1, SIGALRM and SIGTERM.
        let wanted = 1 << 1 | 1 << 9 | 1 << 13 | 1 << 14;
        assert_eq!(u64::from_str_radix(blocked.trim(), 16).unwrap() & wanted, wanted);
    }

    #[test]
    fn a_thread_that_is_not_needed_ends_and_can_be_started_again() {
        let helper = Helper::new(WhenConfined::Work, || Duration::ZERO);
        assert_eq!(helper.ask(LIMIT, || 1), Err(Undone::Ended));
        for number in 0..2 {
            helper.start().unwrap();
            assert_eq!(helper.ask(LIMIT, move || number), Ok(number));
            helper.wait_for_end(LIMIT);
            assert_eq!(helper.ask(LIMIT, || 1), Err(Undone::Ended));
        }
    }

    #[test]
    fn a_closed_helper_does_the_work_it_has_and_takes_no_more() {
        let helper = helper();
        let (done, told) = std::sync::mpsc::channel();
        helper.hand(move |_| done.send(7).unwrap()).unwrap();
        helper.close();
        helper.wait_for_end(LIMIT);
        assert_eq!((told.try_recv(), helper.ask(LIMIT, || 1)), (Ok(7), Err(Undone::Ended)));
        helper.start().unwrap();
        assert_eq!(helper.ask(LIMIT, || 1), Err(Undone::Ended));
    }

    #[test]
    fn a_thread_that_is_waited_for_is_gone() {
        let helper = helper();
        let path =
            helper.ask(LIMIT, || format!("/proc/self/task/{}", rustix::thread::gettid().as_raw_nonzero()));
        let path = path.unwrap();
        assert!(std::fs::exists(&path).unwrap());
        helper.close();
        helper.wait_until_gone(LIMIT);
        assert!(!std::fs::exists(&path).unwrap());
    }
}
