//! A spin lock for the few cold structures that are not page tables: the retired frames, the roots, the shadow MMU.
//!
//! It guarantees mutual exclusion and that what one holder wrote the next holder sees. It is not fair. It may not be
//! taken twice by one thread.
// UNSAFETY: a lock hands out `&mut` to what it guards from a shared reference; the flag makes that exclusive.
#![expect(unsafe_code, reason = "a lock hands out exclusive access from a shared reference")]

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use crate::sync::{AtomicUsize, Backoff, Ordering};

/// A value behind a spin lock.
#[derive(Debug)]
pub(crate) struct Spin<T> {
    held: AtomicUsize,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by the holder of the flag, so sharing the lock only ever moves access to the
// value from thread to thread, which is what `T: Send` permits.
unsafe impl<T: Send> Sync for Spin<T> {}
// SAFETY: the lock owns its value; moving it moves the value.
unsafe impl<T: Send> Send for Spin<T> {}

impl<T> Spin<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { held: AtomicUsize::new(0), value: UnsafeCell::new(value) }
    }

    pub(crate) fn lock(&self) -> Held<'_, T> {
        let mut backoff = Backoff::new();
        loop {
            if let Some(held) = self.try_lock() {
                return held;
            }
            backoff.wait();
        }
    }

    pub(crate) fn try_lock(&self) -> Option<Held<'_, T>> {
        self.held
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            .then(|| Held { lock: self })
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// The right to the value of a [`Spin`], given back on drop.
pub(crate) struct Held<'a, T> {
    lock: &'a Spin<T>,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `Held` exists only between the exchange that took the flag and the store that gives it back, so no
        // other reference to the value exists but those borrowed from this `Held`.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` keeps references from this `Held` exclusive as well.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.lock.held.store(0, Ordering::Release);
    }
}
