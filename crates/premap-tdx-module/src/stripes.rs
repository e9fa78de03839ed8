//! Counters that many threads change at once and few read: each thread has a part of its own.

use premap_mmu::Stripes;

use crate::sync::{AtomicU64, Backoff, Ordering, order};

/// A number in parts. It may be taken off another part than it was put on: parts wrap, the sum does not.
#[derive(Debug)]
pub(crate) struct Striped(Box<Stripes<AtomicU64>>);

impl Striped {
    pub(crate) fn new() -> Self {
        Self(Box::new(Stripes::new(|| AtomicU64::new(0))))
    }

    #[inline]
    pub(crate) fn add(&self, amount: u64) {
        self.0.mine().fetch_add(amount, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn sub(&self, amount: u64) {
        self.0.mine().fetch_sub(amount, Ordering::Relaxed);
    }

    /// The sum. It is exact where the caller keeps others from changing it.
    pub(crate) fn sum(&self) -> u64 {
        self.0.iter().fold(0, |sum, part| sum.wrapping_add(part.load(Ordering::Relaxed)))
    }

    /// Starts again from zero. The caller keeps others from changing it.
    pub(crate) fn reset(&self) {
        self.0.iter().for_each(|part| part.store(0, Ordering::Relaxed));
    }

    /// Says that the calling thread is inside until the guard is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<'_> {
        let part = self.0.mine();
        part.fetch_add(1, Ordering::SeqCst);
        order();
        Inside(part)
    }

    /// Whether nobody is inside.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|part| part.load(Ordering::SeqCst) == 0)
    }

    /// Waits until everyone who was inside has left once. Those who are inside never wait for the caller.
    pub(crate) fn wait_for_leavers(&self) {
        order();
        for part in self.0.iter() {
            let mut backoff = Backoff::new();
            while part.load(Ordering::SeqCst) != 0 {
                backoff.wait();
            }
        }
    }
}

/// Someone is inside.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a AtomicU64);

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}
