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
