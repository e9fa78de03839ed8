//! Mapping with the caller's check under the lock: what a fault handler needs.
//!
//! A fault handler looks up a frame, and meanwhile the memory can be taken away. So it snapshots an invalidation sequence
//! first, and checks it again under the lock of the entry that it is about to publish; who takes memory away moves the
//! sequence first and unmaps then. Either the handler sees the sequence moved, or the unmapping sees the mapping
//! (guarantee 4 of the protocol).

use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize, Pfn};

use super::leaf_table::Found;
use super::map::{Mapped, Run};
use super::{Obstacle, PageTable, Present, Stopped};
use crate::attributes::Attributes;
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Maps one leaf of a size that the address and the frame are aligned to, if `valid` still says so under the lock.
    ///
    /// `valid` may be asked more than once, and a `false` stops with [`Obstacle::Withdrawn`].
    ///
    /// # Panics
    /// The address or the frame is not aligned to the size, or the format has no leaves of it.
    pub fn place(
        &self,
        gpa: Gpa,
        size: PageSize,
        pfn: Pfn,
        attributes: Attributes<F>,
        present: Present,
        mut valid: impl FnMut() -> bool,
    ) -> Mapped<'_, F, A, M> {
        assert!(gpa.is_aligned(size) && pfn.is_aligned(size), "{gpa} and {pfn:?} are no {size} page");
        assert!(size <= F::LARGEST, "{} has no {size} leaves", F::NAME);
        if size == PageSize::Size4K {
            if !M::ACTIVE
                && let Some(done) = self.place_at_once(gpa, pfn, attributes, &mut valid)
            {
                return done;
            }
            return self.fill(GpaRange::new(gpa, PAGE_SIZE), present, valid, |_| Some((pfn, attributes)));
        }
        let guard = self.epochs.pin();
        let mut done = Mapped::nothing(self);
        let mut run = Run { gpa, pfn, left: size.bytes(), attributes, present };
        while run.left > 0 {
            let step = if run.left == size.bytes() {
                self.place_large(&guard, &run, size, &mut done, &mut valid)
            } else {
                break;
            };
            match step {
                Ok(bytes) => run.left -= bytes.min(run.left),
                Err(stopped) => {
                    done.stopped = Some(stopped);
                    break;
                }
            }
        }
        self.account(done.mapped, done.replaced);
        done
    }

    /// Maps one 4 KiB page where the leaf table exists and is free and nothing is mapped: most faults.
    #[inline]
    fn place_at_once(
        &self,
        gpa: Gpa,
        pfn: Pfn,
        attributes: Attributes<F>,
        valid: &mut impl FnMut() -> bool,
    ) -> Option<Mapped<'_, F, A, M>> {
        let guard = self.epochs.pin();
        let block = self.try_lock_existing(&guard, gpa)?;
        if !valid() || !block.install_if_absent(gpa, || F::leaf(pfn, PageSize::Size4K, attributes)) {
            return None;
        }
        let mut done = Mapped::nothing(self);
        done.mapped.size_4k = 1;
        self.account(done.mapped, done.replaced);
        Some(done)
    }

    /// Maps pages of one 2 MiB block, each to the frame and with the attributes that `leaf` gives for its address, under
    /// one taking of the leaf table's lock. Where `leaf` gives `None` nothing changes.
    ///
    /// `valid` is asked once the lock is held and before anything is published; a `false` stops with
    /// [`Obstacle::Withdrawn`]. It may be asked more than once.
    ///
    /// # Panics
    /// The range lies in more than one block of 2 MiB.
    pub fn fill(
        &self,
        range: GpaRange,
        present: Present,
        mut valid: impl FnMut() -> bool,
        mut leaf: impl FnMut(Gpa) -> Option<(Pfn, Attributes<F>)>,
    ) -> Mapped<'_, F, A, M> {
        let last = Gpa::new(range.start().raw() + (range.bytes() - 1));
        let block = range.start().align_down(PageSize::Size2M);
        assert!(last.align_down(PageSize::Size2M) == block, "{range} lies in more than one block");
        let guard = self.epochs.pin();
        let mut done = Mapped::nothing(self);
        let mut gpa = range.start();
        let result = loop {
            // Only of a single page can a look before the lock tell that there is nothing to do.
            let peek = if range.pages() == 1 { present } else { Present::Rebuild };
            let table = match self.lock_leaf_table(&guard, gpa, peek) {
                Ok(Found::LeafTable(table)) => table,
                Ok(Found::Present) => {
                    done.spurious += 1;
                    break Ok(());
                }
                Ok(Found::Leaf(position)) => {
                    if present != Present::Rebuild {
                        done.spurious += range.pages();
                        break Ok(());
                    }
                    match self.split_at(&position, &mut done.flush) {
                        Ok(split) => {
                            let (replaced, mapped) = split.leaves();
                            done.replaced += replaced;
                            done.mapped += mapped;
                            if split.waits() {
                                break Err(Obstacle::Frozen);
                            }
                            continue;
                        }
                        Err(obstacle) => break Err(obstacle),
                    }
                }
                Err(obstacle) => break Err(obstacle),
            };
            if !valid() {
                break Err(Obstacle::Withdrawn);
            }
            let mut result = Ok(());
            while gpa < range.end() && result.is_ok() {
                if let Some((pfn, attributes)) = leaf(gpa) {
                    result = self.place_small(&table, gpa, pfn, attributes, present, &mut done);
                }
                if result.is_ok() {
                    gpa = gpa.wrapping_add(PAGE_SIZE);
                }
            }
            break result;
        };
        done.stopped = result.err().map(|obstacle| Stopped { gpa, obstacle });
        self.account(done.mapped, done.replaced);
        done
    }
}
