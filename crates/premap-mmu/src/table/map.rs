//! Mapping.
//!
//! A range is mapped block by block: a block that is a leaf of its own takes one exchange, and a block of 4 KiB pages
//! takes its leaf table's lock once. Where a block has no leaf table yet, the table is written with plain stores before
//! anyone can see it and published with one exchange; no lock is taken at all.

use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize, Pfn};

use super::leaf_table::Found;
use super::{LeafTable, Obstacle, PageTable, Spare, Stopped};
use crate::attributes::{Attributes, Leaves};
use crate::epoch::Guard;
use crate::flush::Flush;
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::protocol::{State, leaf, state};

/// What mapping does where something is present already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Present {
    /// Every leaf and every table stays; what is absent is mapped around them.
    Keep,
    /// Leaves stay, but a table gives way to a larger leaf if what it maps is part of that leaf.
    Collapse,
    /// A leaf of the same frame gets the new attributes, and a table gives way as with `Collapse`.
    Rebuild,
}

/// What mapping a range did.
#[must_use = "the flush is owed, and the range may not be mapped whole"]
#[derive(Debug)]
pub struct Mapped<'t, F: Format, A: FrameAllocator, M: Mirror> {
    /// Leaves that were not there before.
    pub mapped: Leaves,
    /// Leaves that were there, of the same frame, and got new attributes.
    pub rebuilt: Leaves,
    /// Leaves that gave way to a larger one or were split into smaller ones.
    pub replaced: Leaves,
    /// Pages of 4 KiB whose mapping was there and stayed.
    pub spurious: u64,
    /// What the TLBs must forget: nothing unless something was rebuilt or collapsed.
    pub flush: Flush<'t, F, A, M>,
    /// Where and why the operation stopped short of the range's end.
    pub stopped: Option<Stopped<M::Refusal>>,
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> Mapped<'t, F, A, M> {
    pub(crate) fn nothing(table: &'t PageTable<F, A, M>) -> Self {
        Self {
            mapped: Leaves::NONE,
            rebuilt: Leaves::NONE,
            replaced: Leaves::NONE,
            spurious: 0,
            flush: Flush::none(table),
            stopped: None,
        }
    }
}

/// The frames and attributes to map from one address on.
#[derive(Clone, Copy)]
pub(super) struct Run<F: Format> {
    pub(super) gpa: Gpa,
    pub(super) pfn: Pfn,
    /// How many bytes are to be mapped from here on.
    pub(super) left: u64,
    pub(super) attributes: Attributes<F>,
    pub(super) present: Present,
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Maps a range to a run of frames, with the largest leaves that the alignment of both, the run and `cap` allow.
    ///
    /// It stops at the first obstacle; what was mapped before stays.
    pub fn map(
        &self,
        range: GpaRange,
        pfn: Pfn,
        attributes: Attributes<F>,
        cap: PageSize,
        present: Present,
    ) -> Mapped<'_, F, A, M> {
        let guard = self.epochs.pin();
        let mut done = Mapped::nothing(self);
        let cap = cap.min(F::LARGEST);
        let mut run = Run { gpa: range.start(), pfn, left: range.bytes(), attributes, present };
        while run.left > 0 {
            let size = largest(run.gpa, run.pfn, run.left, cap);
            let step = if size == PageSize::Size4K {
                self.map_small(&guard, &run, &mut done)
            } else {
                self.map_large(&guard, &run, size, &mut done)
            };
            match step {
                Ok(bytes) => {
                    // A larger leaf that was there can reach past the end.
                    let bytes = bytes.min(run.left);
                    run.left -= bytes;
                    run.gpa = run.gpa.wrapping_add(bytes);
                    run.pfn = Pfn::new(run.pfn.number() + bytes / PAGE_SIZE);
                }
                Err(stopped) => {
                    done.stopped = Some(stopped);
                    break;
                }
            }
        }
        self.account(done.mapped, done.replaced);
        done
    }

    /// Maps 4 KiB pages within one block of 2 MiB; returns how far it got.
    pub(super) fn map_small<'t>(
        &'t self,
        guard: &Guard<'t>,
        run: &Run<F>,
        done: &mut Mapped<'t, F, A, M>,
    ) -> Result<u64, Stopped<M::Refusal>> {
        let stop = |obstacle| Stopped { gpa: run.gpa, obstacle };
        let block = PageSize::Size2M.bytes();
        let bytes = run.left.min(block - (run.gpa.raw() & (block - 1)));
        if !M::ACTIVE {
            let position = self.reach(guard, run.gpa, 2).map_err(stop)?;
            if position.level == 2 && position.slot::<F>().is_idle() {
                let count = (bytes / PAGE_SIZE) as usize;
                let first = index(run.gpa, 1);
                let word = F::leaf(run.pfn, PageSize::Size4K, run.attributes);
                let spare = Spare::take(&self.frames).ok_or_else(|| stop(Obstacle::OutOfFrames))?;
                let leaf = |index: usize| word + (index - first) as u64 * PAGE_SIZE;
                if position.slot::<F>().publish_if_absent(spare.write::<F>(first, count, leaf)) {
                    done.mapped.size_4k += count as u64;
                    return Ok(bytes);
                }
            }
        }
        match self.lock_leaf_table(guard, run.gpa, Present::Rebuild).map_err(stop)? {
            Found::Present => Ok(0),
            Found::Leaf(position) => self.map_under_leaf(&position, run, done),
            Found::LeafTable(table) => {
                let mut offset = 0;
                while offset < bytes {
                    let gpa = run.gpa.wrapping_add(offset);
                    let pfn = Pfn::new(run.pfn.number() + offset / PAGE_SIZE);
                    self.place_small(&table, gpa, pfn, run.attributes, run.present, done)
                        .map_err(|obstacle| Stopped { gpa, obstacle })?;
                    offset += PAGE_SIZE;
                }
                Ok(bytes)
            }
        }
    }

    /// Maps one page in a leaf table whose lock is held.
    #[inline]
    pub(crate) fn place_small<'t>(
        &'t self,
        table: &LeafTable<'t, F>,
        gpa: Gpa,
        pfn: Pfn,
        attributes: Attributes<F>,
        present: Present,
        done: &mut Mapped<'t, F, A, M>,
    ) -> Result<(), Obstacle<M::Refusal>> {
        let word = table.word(gpa);
        let old = leaf::load(word);
        match state::<F>(old, 1) {
            State::Absent => {
                if M::ACTIVE {
                    self.mirror().set_leaf(gpa, PageSize::Size4K, pfn).map_err(Obstacle::Refused)?;
                }
                leaf::install(word, F::leaf(pfn, PageSize::Size4K, attributes));
                done.mapped.size_4k += 1;
            }
            State::Leaf if present != Present::Rebuild => done.spurious += 1,
            State::Leaf => {
                if F::frame(old, PageSize::Size4K) != pfn {
                    return Err(Obstacle::Conflict);
                }
                let (old, new) = leaf::change(word, |_| F::leaf(pfn, PageSize::Size4K, attributes));
                if old == new {
                    done.spurious += 1;
                } else {
                    done.rebuilt.size_4k += 1;
                    if narrows::<F>(old, new, PageSize::Size4K) {
                        done.flush.owe(gpa, PAGE_SIZE);
                    }
                }
            }
            _ => return Err(Obstacle::Frozen),
        }
        Ok(())
    }
}

/// Whether a TLB that keeps the old leaf would let a guest do what the new one does not, or not note what it should.
pub(super) fn narrows<F: Format>(old: u64, new: u64, size: PageSize) -> bool {
    let (old, new) = (F::attributes(old, size), F::attributes(new, size));
    !new.permissions.contains(old.permissions)
        || old.memory != new.memory
        || (old.used.dirty && !new.used.dirty)
}

/// The largest leaf that can start at the address and the frame, fits what is left, and is allowed.
pub(super) fn largest(gpa: Gpa, pfn: Pfn, left: u64, cap: PageSize) -> PageSize {
    let fits = |size: &PageSize| {
        *size <= cap && gpa.is_aligned(*size) && pfn.is_aligned(*size) && left >= size.bytes()
    };
    PageSize::ALL.into_iter().rev().find(fits).unwrap_or(PageSize::Size4K)
}
