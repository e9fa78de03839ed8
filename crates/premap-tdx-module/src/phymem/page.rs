//! The bytes of one page.

use std::sync::atomic::{AtomicU64 as Word, Ordering::Relaxed};

use premap_address::PAGE_SIZE;

use crate::operand::ENTRIES;
use crate::sync::AtomicU64;

/// Words in a page.
const WORDS: usize = 512;
const WORD: usize = size_of::<u64>();
/// Bytes in a page.
pub(crate) const BYTES: usize = WORDS * WORD;
const _: () = assert!(BYTES as u64 == PAGE_SIZE);

/// 4 KiB of memory that any thread may read and write at any moment, like memory: in words, each whole at any moment.
///
/// Models keep what a Secure-EPT table holds apart from ordinary content, as loom follows only the former.
#[derive(Debug)]
pub(crate) struct Page {
    words: [Word; WORDS],
    #[cfg(loom)]
    entries: [AtomicU64; ENTRIES],
}

impl Default for Page {
    fn default() -> Self {
        Self {
            words: [const { Word::new(0) }; WORDS],
            #[cfg(loom)]
            entries: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Page {
    /// The page as a table's entries.
    #[inline]
    pub(crate) fn entries(&self) -> &[AtomicU64; ENTRIES] {
        #[cfg(loom)]
        return &self.entries;
        #[cfg(not(loom))]
        &self.words
    }

    /// Stands for the access to the content, which models do not follow: as a change of something, so that they try it
    /// before and after those of others.
    #[inline]
    fn accessed(&self) {
        #[cfg(loom)]
        self.entries[0].fetch_or(0, Relaxed);
    }

    pub(crate) fn zero(&self) {
        self.accessed();
        self.words.iter().for_each(|word| word.store(0, Relaxed));
    }

    pub(crate) fn copy_from(&self, source: &Self) {
        self.accessed();
        for (to, from) in self.words.iter().zip(&source.words) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }

    pub(crate) fn fill_from(&self, bytes: &[u8; BYTES]) {
        self.accessed();
        for (to, from) in self.words.iter().zip(bytes.as_chunks().0) {
            to.store(u64::from_le_bytes(*from), Relaxed);
        }
    }

    /// Reads from `offset` on; what lies beyond the page is not read.
    pub(crate) fn read(&self, offset: usize, mut bytes: &mut [u8]) {
        self.accessed();
        let mut at = offset;
        while let Some(word) = self.words.get(at / WORD).filter(|_| !bytes.is_empty()) {
            let within = at % WORD;
            let part = bytes.len().min(WORD - within);
            let (head, tail) = bytes.split_at_mut(part);
            head.copy_from_slice(&word.load(Relaxed).to_le_bytes()[within..within + part]);
            (bytes, at) = (tail, at + part);
        }
    }

    /// Writes from `offset` on; what lies beyond the page is not written. Bytes beside those written are left alone, even if
    /// others write them at the same time.
    pub(crate) fn write(&self, offset: usize, mut bytes: &[u8]) {
        let mut at = offset;
        while let Some(word) = self.words.get(at / WORD).filter(|_| !bytes.is_empty()) {
            let within = at % WORD;
            let (head, tail) = bytes.split_at(bytes.len().min(WORD - within));
            let mut seen = word.load(Relaxed);
            loop {
                let mut new = seen.to_le_bytes();
                new[within..within + head.len()].copy_from_slice(head);
                match word.compare_exchange_weak(seen, u64::from_le_bytes(new), Relaxed, Relaxed) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            }
            (bytes, at) = (tail, at + head.len());
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_written_wherever_they_start() {
        let page = Page::default();
        page.fill_from(&[0xee; BYTES]);
        let written: Vec<u8> = (0..37).collect();
        for offset in [0, 1, 7, 8, 13, BYTES - 37] {
            page.write(offset, &written);
            let mut read = [0; 37];
            page.read(offset, &mut read);
            assert_eq!(read.as_slice(), written);
        }
        page.write(BYTES - 2, &[1, 2, 3]);
        let mut end = [0; 4];
        page.read(BYTES - 2, &mut end);
        assert_eq!(end, [1, 2, 0, 0]);
        let copy = Page::default();
        copy.copy_from(&page);
        copy.read(50, &mut end);
        assert_eq!(end, [0xee; 4]);
        copy.zero();
        copy.read(50, &mut end);
        assert_eq!(end, [0; 4]);
    }
}
