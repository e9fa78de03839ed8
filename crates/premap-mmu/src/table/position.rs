//! Finding one's way: from the root to an entry.
// UNSAFETY: table entries hold frame numbers; following one makes a reference of a number. That this is right rests on
// the protocol (linked tables are initialised, and not freed while the caller holds an epoch guard).
#![expect(unsafe_code, reason = "follows frame numbers of table entries to the tables")]

use premap_address::Gpa;

use super::{NewTable, Obstacle, PageTable};
use crate::epoch::Guard;
use crate::format::{Format, index, shift};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::TablePage;
use crate::protocol::{Linked, Slot, State, Unlockable, look, state};
use crate::sync::{Ordering, fence};

/// An entry of level 2 or above in the tree, or of level 1 where a walk ends there.
pub(crate) struct Position<'t> {
    pub(crate) page: &'t TablePage,
    pub(crate) index: usize,
    pub(crate) level: u8,
    /// The first address that the entry spans.
    pub(crate) base: Gpa,
    /// The entry as it was found, without its lock bit.
    pub(crate) raw: u64,
    /// The table that it led to.
    pub(crate) below: Option<Linked<'t>>,
}

impl<'t> Position<'t> {
    pub(crate) fn slot<F: Format>(&self) -> Slot<'t, F> {
        Slot::new(self.page.word(self.index))
    }

    /// How many bytes the entry spans.
    pub(crate) fn span(&self) -> u64 {
        1 << shift(self.level)
    }

    /// The first address past what the entry spans.
    pub(crate) fn end(&self) -> Gpa {
        self.base.wrapping_add(self.span())
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    pub(crate) fn page_of_root(&self) -> &TablePage {
        // SAFETY: the root's frame was allocated and initialised when the table was made, and is given back when the
        // table is dropped, which the borrow of the table precludes.
        unsafe { self.frames.pointer(self.root).as_ref() }
    }

    /// The table that an entry led to.
    pub(crate) fn page_of<'t>(&'t self, table: Linked<'t>) -> &'t TablePage {
        // SAFETY: a `Linked` is made only of a table entry that was read where tables are reached from the root: by this
        // function from an entry further up, under a guard. The allocator's pointer is valid for a `TablePage` as long
        // as the frame is not given back. The table was initialised before the release that linked it, which the
        // acquire that read the entry synchronises with; it is given back a grace period after it was unlinked, which
        // the guard holds off, or pinned by a frozen entry while a `Flush` keeps it.
        unsafe { self.frames.pointer(table.frame()).as_ref() }
    }

    /// The leaf table for an address, if a walk gets there without a detour: the entry that points to it, as it was found,
    /// and the table. The straight way down, for the paths whose instructions count.
    #[inline]
    pub(super) fn straight_down<'t>(
        &'t self,
        _guard: &Guard<'_>,
        gpa: Gpa,
    ) -> Option<(Slot<'t, F>, u64, &'t TablePage)> {
        if gpa >= self.limit {
            return None;
        }
        let below = |page: &'t TablePage, level: u8| {
            let (_, table) = Slot::<F>::new(page.word(index(gpa, level))).look();
            table.map(|table| self.page_of(table))
        };
        let mut page = self.page_of_root();
        if self.levels == super::Levels::Five {
            page = below(page, 5)?;
        }
        page = below(below(page, 4)?, 3)?;
        let slot = Slot::<F>::new(page.word(index(gpa, 2)));
        let (raw, table) = slot.look();
        table.map(|table| (slot, raw, self.page_of(table)))
    }

    /// The entry at which a walk to `gpa` ends: a leaf, one that is not present, or at the latest the one of `floor`.
    pub(crate) fn locate<'t>(&'t self, _guard: &Guard<'t>, gpa: Gpa, floor: u8) -> Position<'t> {
        'restart: loop {
            let mut page = self.page_of_root();
            let mut level = self.levels.top();
            loop {
                let index = index(gpa, level);
                let (raw, below) = look::<F>(page.word(index), level);
                if level > floor {
                    if let Some(table) = below {
                        page = self.page_of(table);
                        level -= 1;
                        continue;
                    }
                    if state::<F>(raw, level) == State::Dead {
                        continue 'restart;
                    }
                }
                let base = Gpa::new(gpa.raw() >> shift(level) << shift(level));
                return Position { page, index, level, base, raw, below };
            }
        }
    }

    /// The entry of `level` for `gpa`, with the tables above it made where there are none; or the leaf above it.
    pub(crate) fn reach<'t>(
        &'t self,
        guard: &Guard<'t>,
        gpa: Gpa,
        level: u8,
    ) -> Result<Position<'t>, Obstacle<M::Refusal>> {
        if gpa >= self.limit {
            return Err(Obstacle::BeyondTable);
        }
        loop {
            let position = self.locate(guard, gpa, level);
            if position.level == level || state::<F>(position.raw, position.level) == State::Leaf {
                return Ok(position);
            }
            match position.slot::<F>().lock() {
                Ok(locked) if state::<F>(locked.value(), position.level) == State::Absent => {
                    let table = NewTable::empty::<F>(&self.frames).ok_or(Obstacle::OutOfFrames)?;
                    if M::ACTIVE {
                        let told = self.mirror.link_table(position.base, position.level - 1, table.frame());
                        told.map_err(Obstacle::Refused)?;
                    }
                    locked.publish(F::table(table.into_frame()));
                    fence(Ordering::SeqCst);
                }
                // Someone was faster.
                Ok(_) | Err(Unlockable::Dead) => {}
                Err(Unlockable::Frozen) => return Err(Obstacle::Frozen),
            }
        }
    }
}
