//! The atomics that the crate is built on: core's, or loom's under `--cfg loom`.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

/// Waits a moment inside a spin loop: a processor hint at first, the scheduler's turn after that where there is one.
///
/// A lock holder never sleeps and never allocates while others spin on its leaf table, but it can be preempted; so
/// with `std` a long spin yields.
pub(crate) struct Backoff {
    #[cfg(all(feature = "std", not(loom)))]
    spins: u32,
}

impl Backoff {
    /// Spins this many times before yielding.
    #[cfg(all(feature = "std", not(loom)))]
    const BUSY: u32 = 128;

    pub(crate) const fn new() -> Self {
        Self {
            #[cfg(all(feature = "std", not(loom)))]
            spins: 0,
        }
    }

    pub(crate) fn wait(&mut self) {
        #[cfg(loom)]
        loom::thread::yield_now();
        #[cfg(all(feature = "std", not(loom)))]
        if self.spins < Self::BUSY {
            self.spins += 1;
            core::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
        #[cfg(all(not(feature = "std"), not(loom)))]
        core::hint::spin_loop();
    }
}
