//! The atomics that the crate is built on: std's, or loom's under `--cfg loom`.
//!
//! What threads contend for (locks, Secure-EPT entries, PAMT entries, epochs) is made of these. What is only touched under
//! one of those locks is a [`Field`], which loom need not follow.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};

/// A word that a lock guards, or that nobody waits on.
pub(crate) type Field = std::sync::atomic::AtomicU64;

/// Stands between a write and a read of another word where both sides of a race do so and one must see the other.
///
/// The accesses around it are sequentially consistent, which is enough for the language; loom takes them for acquire and
/// release ones, and wants the fence.
#[inline]
pub(crate) fn order() {
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Waits a moment inside a spin loop: a processor hint at first, the scheduler's turn after that.
pub(crate) struct Backoff {
    spins: u32,
}

impl Backoff {
    /// Spins this many times before yielding.
    const BUSY: u32 = 128;

    pub(crate) const fn new() -> Self {
        Self { spins: 0 }
    }

    pub(crate) fn wait(&mut self) {
        #[cfg(loom)]
        loom::thread::yield_now();
        #[cfg(not(loom))]
        if self.spins < Self::BUSY {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
        self.spins = (self.spins + 1).min(Self::BUSY);
    }
}
