//! All threads of a run begin together.
//!
//! A thread that starts maps memory for itself (its stack, and one for signals), for which the kernel wants the address space
//! alone. Populating holds it shared for as long as a chunk takes. So a thread that began at once would keep those after it
//! from starting at all, for some milliseconds each.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Where threads wait for each other.
#[derive(Debug, Default)]
pub(crate) struct Muster {
    state: Mutex<State>,
    complete: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many have come.
    present: usize,
    /// How many will have, once that is known.
    expected: Option<usize>,
}

impl Muster {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells how many threads there are.
    pub(crate) fn expect(&self, threads: usize) {
        self.lock().expected = Some(threads);
        self.complete.notify_all();
    }

    /// Waits until all threads are here, or `ended` says that some won't come.
    pub(crate) fn wait(&self, ended: impl Fn() -> bool) {
        let mut state = self.lock();
        state.present += 1;
        self.complete.notify_all();
        let waited = self.complete.wait_while(state, |state| {
            state.expected.is_none_or(|expected| state.present < expected) && !ended()
        });
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Wakes who waits, to look whether the run has ended.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.complete.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn nobody_begins_before_all_have_come() {
        let (muster, come) = (Muster::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    come.fetch_add(1, Ordering::SeqCst);
                    muster.wait(|| false);
                    assert_eq!(come.load(Ordering::SeqCst), 3);
                });
            }
            muster.expect(3);
        });
    }

    #[test]
    fn an_end_lets_those_go_who_wait_for_one_that_never_comes() {
        let (muster, ended) = (Muster::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| muster.wait(|| ended.load(Ordering::SeqCst)));
            muster.expect(2);
            ended.store(true, Ordering::SeqCst);
            muster.wake();
        });
    }
}
