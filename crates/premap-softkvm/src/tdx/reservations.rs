//! Pages set aside for a TD before they are added: `nr_premapped`, and which.
//!
//! **Protocol.** A block's reservations change under its lock, which is taken before the mirror's leaf table. A page is
//! reserved or present in the mirror, never both.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use premap_address::{Gfn, Hpa, PageSize};

/// The reserved pages of 2 MiB.
pub(super) type Block = HashMap<u64, Hpa>;

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

    /// Runs `change` on the reservations, by page, of the block that holds `gfn`.
    pub(super) fn with<R>(&self, gfn: Gfn, change: impl FnOnce(&mut Block) -> R) -> R {
        let block = {
            let mut blocks = lock(&self.blocks);
            Arc::clone(blocks.entry(gfn.align_down(PageSize::Size2M).number()).or_default())
        };
        let mut block = lock(&block);
        let before = block.len() as u64;
        let result = change(&mut block);
        self.count.fetch_add((block.len() as u64).wrapping_sub(before), Ordering::AcqRel);
        result
    }

    /// Takes the reservations of pages back, and gives the memory that was set aside.
    pub(super) fn withdraw(&self, pages: &Range<Gfn>) -> Vec<Hpa> {
        let first = pages.start.align_down(PageSize::Size2M).number();
        let blocks: Vec<u64> = lock(&self.blocks)
            .keys()
            .copied()
            .filter(|block| (first..pages.end.number()).contains(block))
            .collect();
        let taken = |block| {
            self.with(Gfn::new(block), |block| {
                block
                    .extract_if(|page, _| pages.contains(&Gfn::new(*page)))
                    .map(|(_, page)| page)
                    .collect::<Vec<_>>()
            })
        };
        blocks.into_iter().flat_map(taken).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_is_counted_and_taken_back_once() {
        let reservations = Reservations::default();
        for page in [5, 511, 512, 2000] {
            reservations.with(Gfn::new(page), |block| block.insert(page, Hpa::new(page << 12)));
        }
        assert_eq!(reservations.count(), 4);
        reservations.with(Gfn::new(5), |block| assert_eq!(block.remove(&5), Some(Hpa::new(5 << 12))));
        let mut taken = reservations.withdraw(&(Gfn::new(500)..Gfn::new(2000)));
        taken.sort();
        assert_eq!(taken, [Hpa::new(511 << 12), Hpa::new(512 << 12)]);
        assert_eq!(reservations.count(), 1);
        assert_eq!(reservations.withdraw(&(Gfn::new(0)..Gfn::new(1 << 20))).len(), 1);
        assert_eq!(reservations.count(), 0);
    }
}
