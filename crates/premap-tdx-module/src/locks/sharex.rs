//! A lock held by many or by one.

use crate::stripes::{Inside, Striped};
use crate::sync::{AtomicU64, Backoff, Ordering, order};

const FREE: u64 = 0;
/// Someone looks whether there are shared holders. It takes a moment, in which newcomers wait.
const CLAIMED: u64 = 1;
const HELD: u64 = 2;

/// A lock held by many or by one. It refuses exactly while it is held the other way.
#[derive(Debug)]
pub(crate) struct Sharex {
    sole: AtomicU64,
    sharers: Striped,
}

impl Sharex {
    pub(crate) fn new() -> Self {
        Self { sole: AtomicU64::new(FREE), sharers: Striped::new() }
    }

    /// Takes the lock with others, unless someone has it alone.
    #[inline]
    pub(crate) fn try_shared(&self) -> Option<Shared<'_>> {
        let inside = self.sharers.enter();
        let mut backoff = Backoff::new();
        loop {
            // Either this sees the claim, or the claim sees this thread inside: both sides write first and then read.
            match self.sole.load(Ordering::SeqCst) {
                FREE => return Some(Shared { _inside: inside }),
                CLAIMED => backoff.wait(),
                _ => return None,
            }
        }
    }

    /// Takes the lock alone, unless anyone has it.
    pub(crate) fn try_exclusive(&self) -> Option<Exclusive<'_>> {
        self.sole.compare_exchange(FREE, CLAIMED, Ordering::SeqCst, Ordering::Relaxed).ok()?;
        order();
        if self.sharers.is_empty() {
            self.sole.store(HELD, Ordering::Release);
            return Some(Exclusive { lock: self });
        }
        self.sole.store(FREE, Ordering::Release);
        None
    }
}

/// A [`Sharex`] held with others.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    _inside: Inside<'a>,
}

/// A [`Sharex`] held alone.
#[derive(Debug)]
pub(crate) struct Exclusive<'a> {
    lock: &'a Sharex,
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.lock.sole.store(FREE, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn many_or_one() {
        let lock = Sharex::new();
        let (first, second) = (lock.try_shared(), lock.try_shared());
        assert!(first.is_some() && second.is_some());
        assert!(lock.try_exclusive().is_none());
        drop(first);
        assert!(lock.try_exclusive().is_none());
        drop(second);
        let sole = lock.try_exclusive();
        assert!(sole.is_some());
        assert!(lock.try_shared().is_none() && lock.try_exclusive().is_none());
        drop(sole);
        assert!(lock.try_shared().is_some());
    }
}

#[cfg(all(test, loom))]
mod loom {
    use ::loom::sync::Arc;
    use ::loom::thread;

    use super::*;

    /// Runs a holder of each kind side by side, and tells which had the lock; what the one changes the other never sees half
    /// done.
    #[test]
    fn one_who_is_alone_is_alone_and_one_of_two_always_gets_it() {
        ::loom::model(|| {
            let lock = Arc::new((Sharex::new(), AtomicU64::new(0)));
            let shared = lock.clone();
            let other = thread::spawn(move || {
                let held = shared.0.try_shared();
                held.inspect(|_| assert_eq!(shared.1.load(Ordering::Relaxed) % 2, 0)).is_some()
            });
            let held = lock.0.try_exclusive();
            let alone = held.is_some();
            if alone {
                lock.1.store(1, Ordering::Relaxed);
                lock.1.store(2, Ordering::Relaxed);
            }
            drop(held);
            assert!(other.join().unwrap_or_default() || alone);
            assert!(lock.0.try_exclusive().is_some());
        });
    }

    #[test]
    fn two_cannot_both_be_alone() {
        ::loom::model(|| {
            let lock = Arc::new((Sharex::new(), AtomicU64::new(0)));
            let take = |lock: &(Sharex, AtomicU64)| {
                let held = lock.0.try_exclusive();
                if held.is_some() {
                    assert_eq!(lock.1.load(Ordering::Relaxed) % 2, 0);
                    lock.1.store(1, Ordering::Relaxed);
                    lock.1.store(2, Ordering::Relaxed);
                }
                held.is_some()
            };
            let shared = lock.clone();
            let other = thread::spawn(move || take(&shared));
            let one = take(&lock);
            assert!(other.join().unwrap_or_default() || one);
        });
    }
}
