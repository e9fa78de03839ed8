//! The dirty bitmap of a slot.

use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for each page of a slot: written since the log was last taken.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    words: Vec<AtomicU64>,
}

impl DirtyLog {
    pub(crate) fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Words of the bitmap: the pages rounded up to 64.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// Marks `pages` from `first` on.
    pub(crate) fn mark(&self, first: u64, pages: u64) {
        let mut page = first;
        while page < first + pages {
            let bits = (64 - page % 64).min(first + pages - page);
            let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (page % 64) };
            if let Some(word) = usize::try_from(page / 64).ok().and_then(|index| self.words.get(index)) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            page += bits;
        }
    }

    /// Takes one word of the bitmap and leaves it clear.
    pub(crate) fn take(&self, word: usize) -> u64 {
        self.words[word].swap(0, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_marked_whole_and_taken_once() {
        for (first, pages) in [(0, 1), (63, 2), (0, 64), (5, 190), (64, 64), (199, 1)] {
            let log = DirtyLog::new(200);
            log.mark(first, pages);
            let marked: Vec<u64> = (0..log.len())
                .flat_map(|word| {
                    let bits = log.take(word);
                    (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
                })
                .collect();
            assert_eq!(marked, (first..first + pages).collect::<Vec<_>>());
            assert!((0..log.len()).all(|word| log.take(word) == 0));
        }
    }
}
