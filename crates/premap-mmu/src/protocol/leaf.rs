//! The words of a leaf table, with the operations that its lock gives the right to.

use super::{AtomicU64, Format, Ordering, frozen, update};

/// The entry.
#[inline]
pub(crate) fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

/// Publishes a leaf in an absent entry.
#[inline]
pub(crate) fn install(word: &AtomicU64, raw: u64) {
    word.store(raw, Ordering::Release);
}

/// Freezes a present leaf; returns it with its last accessed and dirty bits.
#[inline]
pub(crate) fn freeze<F: Format>(word: &AtomicU64) -> u64 {
    word.swap(frozen::<F>(), Ordering::AcqRel)
}

/// Changes a present leaf in place; returns old and new.
#[inline]
pub(crate) fn change(word: &AtomicU64, change: impl FnMut(u64) -> u64) -> (u64, u64) {
    update(word, change)
}
