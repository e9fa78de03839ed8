//! The lock of an entry.

use super::entry::{HOST_PRIORITY, LOCK, Value};
use crate::status::Class;
use crate::sync::{AtomicU64, Ordering};

/// An entry whose lock is held. Dropped, it is given back as it was.
#[derive(Debug)]
#[must_use]
pub(crate) struct Locked<'a> {
    word: &'a AtomicU64,
    value: Value,
    by: Side,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Host,
    Guest,
}

/// Takes an entry's lock for a SEAMCALL, or asks for it: a guest that comes next is turned away.
#[inline]
pub(crate) fn lock_by_host(word: &AtomicU64) -> Option<Locked<'_>> {
    let seen = word.fetch_or(LOCK, Ordering::Acquire);
    if seen & LOCK != 0 {
        word.fetch_or(HOST_PRIORITY, Ordering::Relaxed);
        return None;
    }
    if seen & HOST_PRIORITY != 0 {
        word.fetch_and(!HOST_PRIORITY, Ordering::Relaxed);
    }
    Some(Locked { word, value: Value::from_word(seen), by: Side::Host })
}

/// Takes an entry's lock for a TDCALL.
///
/// # Errors
/// OPERAND_BUSY, or OPERAND_BUSY_HOST_PRIORITY if a host asked for the lock.
pub(crate) fn lock_by_guest(word: &AtomicU64) -> Result<Locked<'_>, Class> {
    let seen = word.fetch_or(LOCK, Ordering::Acquire);
    if seen & LOCK != 0 {
        return Err(Class::OPERAND_BUSY);
    }
    if seen & HOST_PRIORITY != 0 {
        word.fetch_and(!LOCK, Ordering::Release);
        return Err(Class::OPERAND_BUSY_HOST_PRIORITY);
    }
    Ok(Locked { word, value: Value::from_word(seen), by: Side::Guest })
}

impl Locked<'_> {
    /// The entry as it was when it was locked. Nobody else changes it.
    #[inline]
    pub(crate) fn value(&self) -> Value {
        self.value
    }

    /// Publishes a new value and keeps the lock.
    pub(crate) fn publish(&mut self, value: Value) {
        self.value = value;
        // Ordered with what the caller looks at next: who walks meanwhile, which epoch it is.
        self.word.swap(value.raw() | LOCK, Ordering::SeqCst);
    }

    /// Publishes a new value and gives the entry back.
    #[inline]
    pub(crate) fn set(self, value: Value) {
        match self.by {
            // Exchanged and not stored: others set bits here meanwhile, and a store's place among those is hard to reason about.
            Side::Host => {
                self.word.swap(value.raw(), Ordering::Release);
            }
            // A host that asked meanwhile shall have the lock next.
            Side::Guest => {
                let mut seen = self.word.load(Ordering::Relaxed);
                while let Err(now) = self.word.compare_exchange_weak(
                    seen,
                    value.raw() | seen & HOST_PRIORITY,
                    Ordering::Release,
                    Ordering::Relaxed,
                ) {
                    seen = now;
                }
            }
        }
        std::mem::forget(self);
    }

    /// Leaves the entry locked for good: its table is given back.
    pub(crate) fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.word.fetch_and(!LOCK, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_missed_comes_before_the_guest() {
        let word = AtomicU64::new(Value::FREE.raw());
        let guest = lock_by_guest(&word).unwrap();
        assert_eq!(lock_by_guest(&word).unwrap_err(), Class::OPERAND_BUSY);
        assert!(lock_by_host(&word).is_none());
        guest.set(Value::FREE);
        assert_eq!(lock_by_guest(&word).unwrap_err(), Class::OPERAND_BUSY_HOST_PRIORITY);
        drop(lock_by_host(&word).unwrap());
        drop(lock_by_guest(&word).unwrap());
        assert_eq!(word.into_inner(), Value::FREE.raw());
    }
}
