//! Pages set aside for a TD before they are added: `nr_premapped`, and which.
//!
//! **Protocol.** A block's reservations change under its lock, which is taken before the mirror's leaf table. A page is
//! reserved or present in the mirror, never both.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use premap_address::{Gfn, Hpa, PageSize, Pfn};

use super::shards::Shards;
use super::{BLOCK_PAGES, lock};

/// The reserved pages of 2 MiB: frame numbers, which for the memory that a host can have fit 32 bits and are never zero.
#[derive(Debug)]
pub(super) struct Block {
    pages: [Option<NonZeroU32>; BLOCK_PAGES],
    count: u64,
}

fn address(frame: NonZeroU32) -> Hpa {
    Pfn::new(frame.get().into()).address()
}

impl Default for Block {
    fn default() -> Self {
        Self { pages: [None; BLOCK_PAGES], count: 0 }
    }
}

impl Block {
    /// The memory that is set aside for a page.
    pub(super) fn get(&self, gfn: Gfn) -> Option<Hpa> {
        self.pages[index(gfn)].map(address)
    }

    /// Sets memory aside for a page that has none.
    pub(super) fn reserve(&mut self, gfn: Gfn, memory: Hpa) {
        let page = &mut self.pages[index(gfn)];
        debug_assert!(page.is_none(), "{gfn:?} is reserved");
        *page = u32::try_from(memory.frame().number()).ok().and_then(NonZeroU32::new);
        debug_assert!(page.is_some(), "{memory} is no memory of a host");
        self.count += 1;
    }

    /// Takes a reservation back.
    pub(super) fn take(&mut self, gfn: Gfn) -> Option<Hpa> {
        let memory = self.pages[index(gfn)].take();
        self.count -= u64::from(memory.is_some());
        memory.map(address)
    }
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn.number()).unwrap_or(0) % BLOCK_PAGES
}

/// A VM's reservations.
#[derive(Debug, Default)]
pub(super) struct Reservations {
    blocks: Shards<HashMap<u64, Arc<Mutex<Block>>>>,
}

impl Reservations {
    /// How many pages are reserved.
    pub(super) fn count(&self) -> u64 {
        let in_shard = |shard: MutexGuard<'_, HashMap<u64, Arc<Mutex<Block>>>>| -> u64 {
            shard.values().map(|block| lock(block).count).sum()
        };
        self.blocks.iter().map(in_shard).sum()
    }

    /// Runs `change` on the reservations of the block that holds `gfn`.
    pub(super) fn with<R>(&self, gfn: Gfn, change: impl FnOnce(&mut Block) -> R) -> R {
        let first = gfn.align_down(PageSize::Size2M).number();
        let block = Arc::clone(self.blocks.of(gfn).entry(first).or_default());
        change(&mut lock(&block))
    }

    /// Takes the reservations of pages back, and gives the memory that was set aside.
    pub(super) fn withdraw(&self, pages: &Range<Gfn>) -> Vec<Hpa> {
        let first = pages.start.align_down(PageSize::Size2M).number();
        let concerned = first..pages.end.number();
        let in_shard = |shard: MutexGuard<'_, HashMap<u64, _>>| shard.keys().copied().collect::<Vec<u64>>();
        let blocks = self.blocks.iter().flat_map(in_shard).filter(|block| concerned.contains(block));
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
