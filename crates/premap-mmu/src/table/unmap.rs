//! Unmapping.
//!
//! What a range takes away stays frozen until the flush is done. A leaf table that the range covers whole goes as a whole:
//! one exchange of the entry that points to it, whatever it maps.

use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize};

use super::{LeafTable, Obstacle, PageTable, Position, Stopped};
use crate::attributes::Leaves;
use crate::flush::Flush;
use crate::format::{Format, index, leaf_size};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::{TablePage, WORDS};
use crate::protocol::{Locked, State, Unlockable, frozen, leaf, state, thaw};
use crate::sync::{Ordering, fence};

/// What happens to a large leaf that a range covers in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edges {
    /// It is changed as a whole, as if the range covered it. Needs no frame, so it can't fail for want of one.
    Whole,
    /// It is split, and only what the range covers is changed.
    Split,
}

/// What an operation changed.
#[must_use = "the flush is owed, and the range may not be done whole"]
#[derive(Debug)]
pub struct Changed<'t, F: Format, A: FrameAllocator, M: Mirror> {
    /// Leaves that were changed or taken away, by the size they had when that happened.
    pub leaves: Leaves,
    /// Large leaves that were split, or tables' leaves that were collapsed, on the way.
    pub replaced: Leaves,
    /// Leaves that took the place of those.
    pub replacing: Leaves,
    /// What the TLBs must forget.
    pub flush: Flush<'t, F, A, M>,
    /// Where and why the operation stopped short of the range's end.
    pub stopped: Option<Stopped<M::Refusal>>,
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> Changed<'t, F, A, M> {
    pub(crate) fn nothing(table: &'t PageTable<F, A, M>) -> Self {
        Self {
            leaves: Leaves::NONE,
            replaced: Leaves::NONE,
            replacing: Leaves::NONE,
            flush: Flush::none(table),
            stopped: None,
        }
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Unmaps a range.
    ///
    /// With [`Edges::Whole`] it stops only where a mirror refuses, with [`Edges::Split`] also where no frame is left.
    /// Where another thread's flush is still owed, this one's covers it too.
    pub fn unmap(&self, range: GpaRange, edges: Edges) -> Changed<'_, F, A, M> {
        fence(Ordering::SeqCst);
        let guard = self.epochs.pin();
        let mut done = Changed::nothing(self);
        let end = range.end_in(self.levels.limit());
        let mut gpa = range.start();
        while gpa < end {
            let position = self.locate(&guard, gpa, 2);
            if position.slot::<F>().is_idle() {
                gpa = position.end();
                continue;
            }
            let next = position.end().min(end);
            let locked = match position.slot::<F>().lock() {
                Ok(locked) => locked,
                Err(Unlockable::Dead) => continue,
                Err(Unlockable::Frozen) => {
                    done.flush.owe(position.base, position.span());
                    gpa = next;
                    continue;
                }
            };
            let part = Part { gpa, next };
            let result = match state::<F>(locked.value(), position.level) {
                State::Table if position.level > 2 => continue,
                State::Table => self.unmap_leaf_table(&position, locked, part, &mut done),
                State::Leaf if edges == Edges::Split && !part.covers(&position) && !M::ACTIVE => {
                    drop(locked);
                    match self.split_for(&position, &mut done) {
                        Ok(()) => continue,
                        Err(obstacle) => Err(Stopped { gpa, obstacle }),
                    }
                }
                State::Leaf => self.unmap_large(&position, locked, &mut done),
                State::Absent | State::Frozen | State::Dead => Ok(()),
            };
            if let Err(stopped) = result {
                done.stopped = Some(stopped);
                break;
            }
            gpa = next;
        }
        self.account(done.replacing, done.leaves + done.replaced);
        done
    }

    /// Splits a large leaf that an operation is to change in part.
    pub(super) fn split_for<'t>(
        &'t self,
        position: &Position<'t>,
        done: &mut Changed<'t, F, A, M>,
    ) -> Result<(), Obstacle<M::Refusal>> {
        let split = self.split_at(position, &mut done.flush)?;
        let (replaced, replacing) = split.leaves();
        done.replaced += replaced;
        done.replacing += replacing;
        if split.waits() { Err(Obstacle::Frozen) } else { Ok(()) }
    }

    fn unmap_large<'t>(
        &'t self,
        position: &Position<'t>,
        locked: Locked<'t, F>,
        done: &mut Changed<'t, F, A, M>,
    ) -> Result<(), Stopped<M::Refusal>> {
        let Some(size) = leaf_size(position.level) else { return Ok(()) };
        let old = locked.exchange(frozen::<F>());
        if M::ACTIVE {
            let told = self.mirror().remove_leaf(position.base, size, F::frame(old, size));
            told.map_err(|why| {
                // Frozen by us, so ours to change.
                thaw(position.page.word(position.index), old);
                Stopped { gpa: position.base, obstacle: Obstacle::Refused(why) }
            })?;
        }
        done.leaves += Leaves::of(size, 1);
        done.flush.owe(position.base, position.span());
        done.flush.freeze(position.page, position.index, 1, F::ABSENT);
        Ok(())
    }

    fn unmap_leaf_table<'t>(
        &'t self,
        position: &Position<'t>,
        locked: Locked<'t, F>,
        part: Part,
        done: &mut Changed<'t, F, A, M>,
    ) -> Result<(), Stopped<M::Refusal>> {
        let Some(table) = LeafTable::behind(self, locked, position.base) else { return Ok(()) };
        if part.covers(position)
            && !M::ACTIVE
            && let Some(leaves) = only_leaves::<F>(table.page)
        {
            done.flush.remove(table.locked.unlink(frozen::<F>()));
            done.leaves.size_4k += leaves;
            done.flush.owe(position.base, position.span());
            done.flush.freeze(position.page, position.index, 1, F::ABSENT);
            return Ok(());
        }
        let mut gpa = part.gpa;
        let mut mine = 0;
        while gpa < part.next {
            let word = table.word(gpa);
            let raw = leaf::load(word);
            match state::<F>(raw, 1) {
                State::Leaf => {
                    if M::ACTIVE {
                        self.remove_mirrored(word, raw, gpa)?;
                    } else {
                        leaf::freeze::<F>(word);
                    }
                    mine += 1;
                    done.leaves.size_4k += 1;
                    done.flush.owe(gpa, PAGE_SIZE);
                    done.flush.freeze(table.page, index(gpa, 1), 1, F::ABSENT);
                }
                State::Frozen => done.flush.owe(gpa, PAGE_SIZE),
                _ => {}
            }
            gpa = gpa.wrapping_add(PAGE_SIZE);
        }
        if M::ACTIVE && part.covers(position) && absent::<F>(table.page) + mine == WORDS {
            // All that is left in it is what we froze: nobody else's flush needs the table.
            let frame = F::frame(table.locked.value(), PageSize::Size4K);
            let told = self.mirror().remove_table(position.base, 1, frame);
            told.map_err(|why| Stopped { gpa: part.next, obstacle: Obstacle::Refused(why) })?;
            done.flush.remove(table.locked.unlink(frozen::<F>()));
            done.flush.freeze(position.page, position.index, 1, F::ABSENT);
            done.flush.owe(position.base, position.span());
        }
        Ok(())
    }

    /// Takes a leaf from walkers, tells the mirror, and restores it if that refuses.
    fn remove_mirrored(
        &self,
        word: &crate::sync::AtomicU64,
        raw: u64,
        gpa: Gpa,
    ) -> Result<(), Stopped<M::Refusal>> {
        let old = leaf::freeze::<F>(word);
        let told = self.mirror().remove_leaf(gpa, PageSize::Size4K, F::frame(raw, PageSize::Size4K));
        told.map_err(|why| {
            leaf::install(word, old);
            Stopped { gpa, obstacle: Obstacle::Refused(why) }
        })
    }
}

/// The part of a range that one entry spans.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) gpa: Gpa,
    pub(super) next: Gpa,
}

impl Part {
    pub(super) fn covers(self, position: &Position<'_>) -> bool {
        self.gpa == position.base && self.next == position.end()
    }
}

/// How many leaves the table has, or `None` if it has a frozen entry and so can't go.
fn only_leaves<F: Format>(page: &TablePage) -> Option<u64> {
    let (mut present, mut absent) = (0, 0);
    for word in page.words() {
        let raw = leaf::load(word);
        present += u64::from(F::is_present(raw));
        absent += u64::from(raw == F::ABSENT);
    }
    (present + absent == WORDS as u64).then_some(present)
}

/// How many entries of a table whose lock is held are absent.
fn absent<F: Format>(page: &TablePage) -> usize {
    page.words().iter().filter(|word| leaf::load(word) == F::ABSENT).count()
}

/// The end of a range within a table.
pub(super) trait EndIn {
    fn end_in(self, limit: Gpa) -> Gpa;
}

impl EndIn for GpaRange {
    fn end_in(self, limit: Gpa) -> Gpa {
        self.end().min(limit)
    }
}
