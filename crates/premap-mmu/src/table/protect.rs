//! Changing leaves in place: what they permit, and what they note of their use.

use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize};

use super::unmap::{EndIn, Part};
use super::{Changed, Edges, LeafTable, PageTable, Stopped};
use crate::attributes::{Attributes, Leaves, Mapping, Permissions};
use crate::format::{Format, TracksUse, leaf_size};
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::protocol::{State, Unlockable, leaf, state};
use crate::sync::{Ordering, fence};

impl<F: Format, A: FrameAllocator> PageTable<F, A, NoMirror> {
    /// Gives every leaf of a range these permissions. Their use and memory type stay.
    pub fn protect(
        &self,
        range: GpaRange,
        permissions: Permissions,
        edges: Edges,
    ) -> Changed<'_, F, A, NoMirror> {
        self.change(
            range,
            edges,
            |raw, size| {
                let attributes = F::attributes(raw, size);
                F::leaf(F::frame(raw, size), size, Attributes { permissions, ..attributes })
            },
            |_| {},
        )
    }

    /// Takes the permission to write from every leaf of a range, for dirty logging by faults.
    pub fn write_protect(&self, range: GpaRange, edges: Edges) -> Changed<'_, F, A, NoMirror> {
        self.change(range, edges, |raw, _| F::write_protected(raw), |_| {})
    }
}

impl<F: TracksUse, A: FrameAllocator> PageTable<F, A, NoMirror> {
    /// Marks every leaf of a range as not written, and tells `dirty` of those that were. Large leaves are told and
    /// cleared as a whole.
    pub fn test_and_clear_dirty(
        &self,
        range: GpaRange,
        dirty: impl FnMut(Mapping<F>),
    ) -> Changed<'_, F, A, NoMirror> {
        self.change(range, Edges::Whole, |raw, _| F::clean(raw), dirty)
    }

    /// Marks every leaf of a range as not touched, and tells `accessed` of those that were.
    ///
    /// The flush is owed only by who needs the next touch to be noted at once; it may be completed without invalidating.
    pub fn test_and_clear_accessed(
        &self,
        range: GpaRange,
        accessed: impl FnMut(Mapping<F>),
    ) -> Changed<'_, F, A, NoMirror> {
        self.change(range, Edges::Whole, |raw, _| F::old(raw), accessed)
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Changes every leaf of a range in place, and tells `changed` of each as it was before.
    pub(super) fn change(
        &self,
        range: GpaRange,
        edges: Edges,
        mut change: impl FnMut(u64, PageSize) -> u64,
        mut changed: impl FnMut(Mapping<F>),
    ) -> Changed<'_, F, A, M> {
        fence(Ordering::SeqCst);
        let guard = self.epochs.pin();
        let mut done = Changed::nothing(self);
        let end = range.end_in(self.levels.limit());
        let mut gpa = range.start();
        while gpa < end {
            let position = self.locate(&guard, gpa, 2);
            let next = position.end().min(end);
            if position.slot::<F>().is_idle() {
                gpa = next;
                continue;
            }
            let locked = match position.slot::<F>().lock() {
                Ok(locked) => locked,
                Err(Unlockable::Dead) => continue,
                Err(Unlockable::Frozen) => {
                    done.flush.owe(position.base, position.span());
                    gpa = next;
                    continue;
                }
            };
            let mut note = |gpa, old, new, size: PageSize| {
                if old != new
                    && let Some(was) = Self::leaf_at(old, size.level(), gpa)
                {
                    done.leaves += Leaves::of(size, 1);
                    done.flush.owe(gpa, size.bytes());
                    changed(was);
                }
            };
            match (state::<F>(locked.value(), position.level), leaf_size(position.level)) {
                (State::Table, _) if position.level > 2 => continue,
                (State::Table, _) => {
                    let Some(table) = LeafTable::behind(self, locked, position.base) else { continue };
                    let mut gpa = gpa;
                    while gpa < next {
                        self.change_small(&table, gpa, &mut change, &mut note);
                        gpa = gpa.wrapping_add(PAGE_SIZE);
                    }
                }
                (State::Leaf, Some(size)) => {
                    let raw = locked.value();
                    let whole = edges == Edges::Whole || Part { gpa, next }.covers(&position);
                    if whole {
                        let (old, new) = locked.update(|raw| change(raw, size));
                        note(position.base, old, new, size);
                    } else if change(raw, size) != raw {
                        drop(locked);
                        match self.split_for(&position, &mut done) {
                            Ok(()) => continue,
                            Err(obstacle) => {
                                done.stopped = Some(Stopped { gpa, obstacle });
                                break;
                            }
                        }
                    }
                }
                _ => {}
            }
            gpa = next;
        }
        self.account(done.replacing, done.replaced);
        done
    }

    fn change_small(
        &self,
        table: &LeafTable<'_, F>,
        gpa: Gpa,
        change: &mut impl FnMut(u64, PageSize) -> u64,
        note: &mut impl FnMut(Gpa, u64, u64, PageSize),
    ) {
        let word = table.word(gpa);
        let raw = leaf::load(word);
        // Most leaves need no change, and an exchange costs some twenty times a load.
        if state::<F>(raw, 1) == State::Leaf && change(raw, PageSize::Size4K) != raw {
            let (old, new) = leaf::change(word, |raw| change(raw, PageSize::Size4K));
            note(gpa, old, new, PageSize::Size4K);
        }
    }
}
