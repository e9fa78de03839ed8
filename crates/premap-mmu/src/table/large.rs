//! Leaves of 2 MiB and 1 GiB: mapping one, collapsing a table into one, splitting one into a table.

use alloc::vec::Vec;

use premap_address::{PAGE_SIZE, PageSize, Pfn};

use super::leaf_table::{Contents, contents};
use super::map::{Mapped, Run, narrows};
use super::resize::uniform_table;
use super::{NewTable, Obstacle, PageTable, Position, Present, Spare, Stopped};
use crate::attributes::{Attributes, Leaves};
use crate::epoch::Guard;
use crate::flush::Flush;
use crate::format::{Format, leaf_size};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::{TablePage, WORDS};
use crate::protocol::{Linked, Locked, Slot, State, Unlockable, dead, frozen, state};
use crate::sync::{Ordering, fence};

/// Why a table can't give way to a larger leaf.
pub(crate) enum Stays {
    Frozen,
    /// A leaf of another frame.
    Other,
}

/// How a split went.
pub(super) enum Split {
    /// There was no leaf any more.
    Nothing,
    /// The table is there.
    Done(PageSize, PageSize),
    /// The entry is frozen; the table will be there when the flush is done.
    AfterFlush(PageSize, PageSize),
}

impl Split {
    /// The leaves that went and those that came.
    pub(super) fn leaves(&self) -> (Leaves, Leaves) {
        match *self {
            Self::Nothing => (Leaves::NONE, Leaves::NONE),
            Self::Done(size, smaller) | Self::AfterFlush(size, smaller) => {
                (Leaves::of(size, 1), Leaves::of(smaller, WORDS as u64))
            }
        }
    }

    /// Whether nothing can be done there until the flush is done.
    pub(super) fn waits(&self) -> bool {
        matches!(self, Self::AfterFlush(..))
    }
}

/// What is locked and known of a table that will give way.
pub(crate) struct Collapsible<'t, F: Format> {
    /// The leaves that go.
    pub(crate) leaves: Leaves,
    /// The entries of a level-2 table, each locked.
    entries: Vec<Locked<'t, F>>,
    /// The table itself, and the leaf tables behind its entries.
    tables: Vec<Linked<'t>>,
}

impl<'t, F: Format> Collapsible<'t, F> {
    /// Whether any leaf that would go is dirty, or `None` if not all have these attributes, whatever their use.
    pub(super) fn uniform(
        &self,
        table: &'t PageTable<F, impl FrameAllocator, impl Mirror>,
        attributes: Attributes<F>,
    ) -> Option<bool> {
        let top = if self.entries.is_empty() { PageSize::Size4K } else { PageSize::Size2M };
        let sizes = core::iter::once(top).chain(core::iter::repeat(PageSize::Size4K));
        self.tables.iter().zip(sizes).try_fold(false, |dirty, (&own, size)| {
            Some(uniform_table(table.page_of(own), size, attributes)? || dirty)
        })
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Maps one leaf of 2 MiB or 1 GiB, or what of it is absent; returns how far it got.
    pub(super) fn map_large<'t>(
        &'t self,
        guard: &Guard<'t>,
        run: &Run<F>,
        size: PageSize,
        done: &mut Mapped<'t, F, A, M>,
    ) -> Result<u64, Stopped<M::Refusal>> {
        self.place_large(guard, run, size, done, || true)
    }

    /// Maps one leaf of 2 MiB or 1 GiB; `valid` is asked while its entry is locked and nothing is published yet.
    pub(super) fn place_large<'t>(
        &'t self,
        guard: &Guard<'t>,
        run: &Run<F>,
        size: PageSize,
        done: &mut Mapped<'t, F, A, M>,
        mut valid: impl FnMut() -> bool,
    ) -> Result<u64, Stopped<M::Refusal>> {
        let stop = |obstacle| Stopped { gpa: run.gpa, obstacle };
        let new = F::leaf(run.pfn, size, run.attributes);
        loop {
            let position = self.reach(guard, run.gpa, size.level()).map_err(stop)?;
            if position.level > size.level() {
                return self.map_under_leaf(&position, run, done);
            }
            let locked = match position.slot::<F>().lock() {
                Ok(locked) => locked,
                Err(Unlockable::Dead) => continue,
                Err(Unlockable::Frozen) => return Err(stop(Obstacle::Frozen)),
            };
            fence(Ordering::SeqCst);
            if !valid() {
                return Err(stop(Obstacle::Withdrawn));
            }
            match state::<F>(locked.value(), position.level) {
                State::Absent => {
                    if M::ACTIVE {
                        let told = self.mirror().set_leaf(run.gpa, size, run.pfn);
                        told.map_err(|refusal| stop(Obstacle::Refused(refusal)))?;
                    }
                    locked.publish(new);
                    done.mapped += Leaves::of(size, 1);
                }
                State::Leaf if run.present != Present::Rebuild => done.spurious += size.pages(),
                State::Leaf if F::frame(locked.value(), size) != run.pfn => {
                    return Err(stop(Obstacle::Conflict));
                }
                State::Leaf => {
                    let (old, new) = locked.update(|_| new);
                    if old == new {
                        done.spurious += size.pages();
                    } else {
                        done.rebuilt += Leaves::of(size, 1);
                        if narrows::<F>(old, new, size) {
                            done.flush.owe(run.gpa, size.bytes());
                        }
                    }
                }
                // A mirror can't change a leaf's size, so there tables stay.
                State::Table if run.present == Present::Keep || M::ACTIVE => {
                    drop(locked);
                    return self.map_around(guard, run, size, done);
                }
                State::Table => {
                    let gone = match self.collapsible(&locked, run.pfn, size) {
                        Ok(gone) => gone,
                        Err(Stays::Frozen) => return Err(stop(Obstacle::Frozen)),
                        Err(Stays::Other) => return Err(stop(Obstacle::Conflict)),
                    };
                    done.mapped += Leaves::of(size, 1);
                    done.replaced += gone.leaves;
                    self.replace_table(&position, locked, gone, new, &mut done.flush);
                }
                State::Frozen | State::Dead => continue,
            }
            return Ok(size.bytes());
        }
    }

    /// Maps what is absent of a large leaf's span with the next smaller leaves, since a table is there and stays.
    fn map_around<'t>(
        &'t self,
        guard: &Guard<'t>,
        run: &Run<F>,
        size: PageSize,
        done: &mut Mapped<'t, F, A, M>,
    ) -> Result<u64, Stopped<M::Refusal>> {
        let smaller = size.smaller().unwrap_or(PageSize::Size4K);
        let mut offset = 0;
        while offset < size.bytes() {
            let pfn = Pfn::new(run.pfn.number() + offset / PAGE_SIZE);
            let part = Run { gpa: run.gpa.wrapping_add(offset), pfn, left: size.bytes() - offset, ..*run };
            let step = match smaller {
                PageSize::Size4K => self.map_small(guard, &part, done)?,
                _ => self.map_large(guard, &part, smaller, done)?,
            };
            offset += step.min(part.left);
        }
        Ok(size.bytes())
    }

    /// Finds a larger leaf where something smaller was to be mapped; returns how far that leaf reaches.
    pub(super) fn map_under_leaf<'t>(
        &'t self,
        position: &Position<'t>,
        run: &Run<F>,
        done: &mut Mapped<'t, F, A, M>,
    ) -> Result<u64, Stopped<M::Refusal>> {
        let stop = |obstacle| Stopped { gpa: run.gpa, obstacle };
        let raw = position.raw;
        let Some(mapping) = Self::leaf_at(raw, position.level, position.base) else {
            return Ok(0);
        };
        let reach = position.end().raw() - run.gpa.raw();
        if run.present != Present::Rebuild {
            done.spurious += reach.min(run.left) / PAGE_SIZE;
            return Ok(reach);
        }
        if mapping.translate(run.gpa) != Some(run.pfn.address()) {
            return Err(stop(Obstacle::Conflict));
        }
        let wanted = F::leaf(mapping.pfn, mapping.page_size, run.attributes);
        if (wanted ^ raw) & !F::USE_BITS == 0 {
            done.spurious += reach.min(run.left) / PAGE_SIZE;
            return Ok(reach);
        }
        let split = self.split_at(position, &mut done.flush).map_err(stop)?;
        let (replaced, mapped) = split.leaves();
        done.replaced += replaced;
        done.mapped += mapped;
        if split.waits() { Err(stop(Obstacle::Frozen)) } else { Ok(0) }
    }

    /// Splits the leaf of an entry, if it still is one, into a table of the next smaller leaves.
    pub(super) fn split_at<'t>(
        &'t self,
        position: &Position<'t>,
        flush: &mut Flush<'t, F, A, M>,
    ) -> Result<Split, Obstacle<M::Refusal>> {
        let Some((size, smaller)) = leaf_size(position.level).and_then(|size| Some((size, size.smaller()?)))
        else {
            return Ok(Split::Nothing);
        };
        let mut spare = Spare::take(&self.frames).ok_or(Obstacle::OutOfFrames)?;
        let mut locked = match position.slot::<F>().lock() {
            Ok(locked) if state::<F>(locked.value(), position.level) == State::Leaf => locked,
            Err(Unlockable::Frozen) => return Err(Obstacle::Frozen),
            _ => return Ok(Split::Nothing),
        };
        if F::BREAK_BEFORE_MAKE {
            let old = locked.exchange(frozen::<F>());
            let table = write_split::<F, A>(spare, old, size, smaller);
            flush.owe(position.base, size.bytes());
            flush.freeze(position.page, position.index, 1, F::table(table.into_frame()));
            return Ok(Split::AfterFlush(size, smaller));
        }
        loop {
            let table = write_split::<F, A>(spare, locked.value(), size, smaller);
            match locked.replace(table) {
                Ok(()) => return Ok(Split::Done(size, smaller)),
                Err(used) => (locked, spare) = used,
            }
        }
    }

    /// Locks what is needed to replace the table behind a locked entry by one leaf of the frames from `pfn` on.
    pub(super) fn collapsible<'t>(
        &'t self,
        locked: &Locked<'t, F>,
        pfn: Pfn,
        size: PageSize,
    ) -> Result<Collapsible<'t, F>, Stays> {
        let top = locked.below().ok_or(Stays::Other)?;
        let page = self.page_of(top);
        let mut gone = Collapsible { leaves: Leaves::NONE, entries: Vec::new(), tables: Vec::from([top]) };
        if size == PageSize::Size2M {
            gone.leaves.size_4k = run_of::<F>(page, pfn)?;
            return Ok(gone);
        }
        for (index, word) in page.words().iter().enumerate() {
            let pfn = Pfn::new(pfn.number() + index as u64 * PageSize::Size2M.pages());
            let entry = Slot::<F>::new(word).lock().map_err(|_| Stays::Frozen)?;
            match state::<F>(entry.value(), 2) {
                State::Leaf if F::frame(entry.value(), PageSize::Size2M) == pfn => gone.leaves.size_2m += 1,
                State::Leaf => return Err(Stays::Other),
                State::Table | State::Absent | State::Frozen | State::Dead => {}
            }
            if let Some(table) = entry.below() {
                gone.leaves.size_4k += run_of::<F>(self.page_of(table), pfn)?;
                gone.tables.push(table);
            }
            gone.entries.push(entry);
        }
        Ok(gone)
    }

    /// Replaces a table by a leaf.
    pub(super) fn replace_table<'t>(
        &'t self,
        position: &Position<'t>,
        locked: Locked<'t, F>,
        gone: Collapsible<'t, F>,
        new: u64,
        flush: &mut Flush<'t, F, A, M>,
    ) {
        for entry in gone.entries {
            flush.remove(entry.unlink(dead::<F>()));
        }
        if F::BREAK_BEFORE_MAKE {
            flush.remove(locked.unlink(frozen::<F>()));
            flush.freeze(position.page, position.index, 1, new);
        } else {
            flush.remove(locked.unlink(new));
        }
        flush.owe(position.base, position.span());
    }
}

/// Writes a table that maps what the leaf mapped.
fn write_split<'t, F: Format, A: FrameAllocator>(
    spare: Spare<'t, A>,
    leaf: u64,
    size: PageSize,
    smaller: PageSize,
) -> NewTable<'t, A> {
    let (first, attributes) = (F::frame(leaf, size), F::attributes(leaf, size));
    spare.write::<F>(0, WORDS, |index| {
        F::leaf(Pfn::new(first.number() + index as u64 * smaller.pages()), smaller, attributes)
    })
}

fn run_of<F: Format>(page: &TablePage, first: Pfn) -> Result<u64, Stays> {
    match contents::<F>(page, first) {
        Contents::Run { leaves } => Ok(leaves),
        Contents::Frozen => Err(Stays::Frozen),
        Contents::Other => Err(Stays::Other),
    }
}
