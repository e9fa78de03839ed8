//! Pages set aside for a TD before they are added: `nr_premapped`, and which.
//!
//! **Protocol.** A block's reservations change under its lock, which is taken before the mirror's leaf table. A page is
//! reserved or present in the mirror, never both.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use premap_address::{Gfn, Hpa, PageSize};

/// The pages of a block.
const PAGES: usize = PageSize::Size2M.pages() as usize;

/// The reserved pages of 2 MiB.
#[derive(Debug)]
pub(super) struct Block {
    pages: [Option<Hpa>; PAGES],
    count: u64,
}

impl Default for Block {
    fn default() -> Self {
        Self { pages: [None; PAGES], count: 0 }
    }
}

impl Block {
    fn page(&mut self, gfn: Gfn) -> &mut Option<Hpa> {
        &mut self.pages[index(gfn)]
    }

    /// The memory that is set aside for a page.
    pub(super) fn get(&self, gfn: Gfn) -> Option<Hpa> {
        self.pages[index(gfn)]
    }

    /// Sets memory aside for a page that has none.
    pub(super) fn reserve(&mut self, gfn: Gfn, memory: Hpa) {
        let page = self.page(gfn);
        debug_assert!(page.is_none(), "{gfn:?} is reserved");
        *page = Some(memory);
        self.count += 1;
    }

    /// Takes a reservation back.
    pub(super) fn take(&mut self, gfn: Gfn) -> Option<Hpa> {
        let memory = self.page(gfn).take();
        self.count -= u64::from(memory.is_some());
        memory
    }
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn.number()).unwrap_or(0) % PAGES
}

/// A VM's reservations.
#[derive(Debug, Default)]
pub(super) struct Reservations {
    blocks: Mutex<HashMap<u64, Arc<Mutex<Block>>>>,
    count: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reservations {
    /// How many pages are reserved.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Runs `change` on the reservations of the block that holds `gfn`.
    pub(super) fn with<R>(&self, gfn: Gfn, change: impl FnOnce(&mut Block) -> R) -> R {
        let block = {
            let mut blocks = lock(&self.blocks);
            Arc::clone(blocks.entry(gfn.align_down(PageSize::Size2M).number()).or_default())
        };
        let mut block = lock(&block);
        let before = block.count;
        let result = change(&mut block);
        self.count.fetch_add(block.count.wrapping_sub(before), Ordering::AcqRel);
        result
    }

    /// Takes the reservations of pages back, and gives the memory that was set aside.
    pub(super) fn withdraw(&self, pages: &Range<Gfn>) -> Vec<Hpa> {
        let first = pages.start.align_down(PageSize::Size2M).number();
        let concerned = first..pages.end.number();
        let blocks: Vec<u64> =
            lock(&self.blocks).keys().copied().filter(|block| concerned.contains(block)).collect();
        let mut taken = Vec::new();
        for start in blocks {
            let own =
                (start..start + PageSize::Size2M.pages()).map(Gfn::new).filter(|gfn| pages.contains(gfn));
            self.with(Gfn::new(start), |block| taken.extend(own.filter_map(|gfn| block.take(gfn))));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_is_counted_and_taken_back_once() {
        let reservations = Reservations::default();
        for page in [5, 511, 512, 2000] {
            let (gfn, memory) = (Gfn::new(page), Hpa::new(page << 12));
            reservations.with(gfn, |block| block.reserve(gfn, memory));
        }
        assert_eq!(reservations.count(), 4);
        let five = Gfn::new(5);
        reservations.with(five, |block| assert_eq!(block.get(five), Some(Hpa::new(5 << 12))));
        reservations.with(five, |block| assert_eq!(block.take(five), Some(Hpa::new(5 << 12))));
        let mut taken = reservations.withdraw(&(Gfn::new(500)..Gfn::new(2000)));
        taken.sort();
        assert_eq!(taken, [Hpa::new(511 << 12), Hpa::new(512 << 12)]);
        assert_eq!(reservations.count(), 1);
        assert_eq!(reservations.withdraw(&(Gfn::new(0)..Gfn::new(1 << 20))).len(), 1);
        assert_eq!(reservations.count(), 0);
    }
}
