//! One table: 512 words in a 4 KiB frame.
// UNSAFETY: a new table is written before anyone else can see it, through a pointer, since the words are not yet
// initialised and plain stores of a whole run are several times faster than atomic ones.
#![expect(unsafe_code, reason = "initialises table pages in memory of the caller's allocator")]

use core::ptr::{self, NonNull};

use crate::sync::AtomicU64;

/// How many words of a table are really there. A loom word is far larger than eight bytes and each costs model time, so
/// models see the first four entries of each table; all else is the same code.
pub(crate) const WORDS: usize = if cfg!(loom) { 4 } else { 512 };

/// The words of one table. Opaque: only this crate reads and writes them.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct TablePage {
    words: [AtomicU64; WORDS],
}

impl TablePage {
    /// The word of an entry.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        &self.words[index]
    }

    /// Tells the processor that an entry will be written, so that its cache line comes in at once as its own.
    #[inline]
    pub(crate) fn expect_write(&self, index: usize) {
        #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
        // SAFETY: a prefetch reads and writes nothing, whatever the address.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_ET0>(ptr::from_ref(self.word(index)).cast());
        }
        #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
        let _ = index;
    }

    /// Every word.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64; WORDS] {
        &self.words
    }

    /// Writes a new table: `value(first)`, `value(first + 1)` and so on for `count` entries from `first`, and `fill` in
    /// all others.
    ///
    /// # Safety
    /// `page` is valid for writes of a `TablePage` and nobody else uses it.
    #[inline]
    pub(crate) unsafe fn initialise(
        page: NonNull<Self>,
        fill: u64,
        first: usize,
        count: usize,
        mut value: impl FnMut(usize) -> u64,
    ) {
        let words = page.cast::<AtomicU64>();
        let write = |index: usize, raw: u64| {
            // SAFETY: `index` is below `WORDS` in each loop below, the words are the page's first field (repr(C)), and
            // the caller lets us write the page, which nobody else uses.
            unsafe { ptr::write(words.add(index).as_ptr(), AtomicU64::new(raw)) }
        };
        let first = first.min(WORDS);
        let end = (first + count).min(WORDS);
        for index in 0..first {
            write(index, fill);
        }
        for index in first..end {
            write(index, value(index));
        }
        for index in end..WORDS {
            write(index, fill);
        }
    }
}
