//! A leaf table whose lock is held: 512 entries that only the holder changes.

use premap_address::{Gpa, PageSize, Pfn};

use super::{NewTable, Obstacle, PageTable, Position, Present};
use crate::attributes::Mapping;
use crate::epoch::Guard;
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::TablePage;
use crate::protocol::{Locked, State, Unlockable, leaf, state};
use crate::sync::{AtomicU64, Ordering, fence};

/// A leaf table and its lock, given back on drop.
pub(crate) struct LeafTable<'t, F: Format> {
    pub(crate) locked: Locked<'t, F>,
    pub(crate) page: &'t TablePage,
    /// The first address that the table spans.
    pub(crate) base: Gpa,
}

/// What lies where a leaf table was wanted.
pub(crate) enum Found<'t, F: Format> {
    LeafTable(LeafTable<'t, F>),
    /// A larger leaf, not locked.
    Leaf(Position<'t>),
    /// A leaf of 4 KiB that the caller lets stay; nothing is locked.
    Present,
}

impl<'t, F: Format> LeafTable<'t, F> {
    /// The leaf table behind a locked entry of level 2, if it points to one.
    pub(crate) fn behind<A: FrameAllocator, M: Mirror>(
        table: &'t PageTable<F, A, M>,
        locked: Locked<'t, F>,
        base: Gpa,
    ) -> Option<Self> {
        let page = table.page_of(locked.below()?);
        Some(Self { locked, page, base })
    }

    /// Whether the address lies in what the table spans.
    #[inline]
    pub(crate) fn spans(&self, gpa: Gpa) -> bool {
        gpa.align_down(PageSize::Size2M) == self.base
    }

    /// Publishes a leaf where nothing is; false if something is there.
    #[inline]
    pub(crate) fn install_if_absent(&self, gpa: Gpa, raw: impl FnOnce() -> u64) -> bool {
        let word = self.word(gpa);
        let absent = leaf::load(word) == F::ABSENT;
        if absent {
            leaf::install(word, raw());
        }
        absent
    }

    /// The entry's word.
    #[inline]
    pub(crate) fn word(&self, gpa: Gpa) -> &'t AtomicU64 {
        self.page.word(index(gpa, 1))
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Locks the leaf table that spans `gpa` if it exists and nobody holds its lock.
    ///
    /// The common case of mapping a single page, in as few instructions as can be: in random order the time goes into
    /// misses of the leaf entries' cache lines, and as many of these overlap as there are calls in the processor's
    /// window. For the same reason the entry's line is asked for before the lock is taken.
    #[inline]
    pub(crate) fn try_lock_existing<'t>(&'t self, guard: &Guard<'t>, gpa: Gpa) -> Option<LeafTable<'t, F>> {
        let (slot, raw, page) = self.straight_down(guard, gpa)?;
        page.expect_write(index(gpa, 1));
        let locked = slot.try_lock_seen(raw)?;
        Some(LeafTable { locked, page, base: gpa.align_down(PageSize::Size2M) })
    }

    /// Asks for the cache line of an entry that is about to be written, if its table exists.
    #[inline]
    pub(crate) fn expect_write(&self, guard: &Guard<'_>, gpa: Gpa) {
        if let Some((_, _, page)) = self.straight_down(guard, gpa) {
            page.expect_write(index(gpa, 1));
        }
    }

    /// Locks the leaf table that spans `gpa`, made if there is none, unless a leaf is there that `present` lets stay.
    ///
    /// What the caller reads afterwards of its own state is as new as guarantee 4 of the protocol says.
    pub(crate) fn lock_leaf_table<'t>(
        &'t self,
        guard: &Guard<'t>,
        gpa: Gpa,
        present: Present,
    ) -> Result<Found<'t, F>, Obstacle<M::Refusal>> {
        let mut spare = None;
        loop {
            let position = self.reach(guard, gpa, 2)?;
            let base = position.base;
            match state::<F>(position.raw, position.level) {
                State::Leaf => return Ok(Found::Leaf(position)),
                State::Table => {
                    let entry = position.below.map(|table| self.page_of(table).word(index(gpa, 1)));
                    let seen = entry.is_some_and(|word| F::is_present(leaf::load(word)));
                    if seen && present != Present::Rebuild {
                        return Ok(Found::Present);
                    }
                }
                State::Absent if spare.is_none() => {
                    spare = Some(NewTable::empty::<F>(&self.frames).ok_or(Obstacle::OutOfFrames)?);
                }
                _ => {}
            }
            let locked = match position.slot::<F>().lock() {
                Ok(locked) => locked,
                Err(Unlockable::Dead) => continue,
                Err(Unlockable::Frozen) => return Err(Obstacle::Frozen),
            };
            match state::<F>(locked.value(), 2) {
                State::Table => {
                    if let Some(table) = LeafTable::behind(self, locked, base) {
                        return Ok(Found::LeafTable(table));
                    }
                }
                State::Absent => {
                    let Some(table) = spare.take() else { continue };
                    if M::ACTIVE {
                        self.mirror().link_table(base, 1, table.frame()).map_err(Obstacle::Refused)?;
                    }
                    let locked = locked.publish_locked(table);
                    fence(Ordering::SeqCst);
                    if let Some(table) = LeafTable::behind(self, locked, base) {
                        return Ok(Found::LeafTable(table));
                    }
                }
                _ => {}
            }
        }
    }

    /// The leaf that an entry of level 1 holds, if it holds one.
    pub(crate) fn leaf_at(raw: u64, level: u8, base: Gpa) -> Option<Mapping<F>> {
        let page_size = crate::format::leaf_size(level)?;
        (state::<F>(raw, level) == State::Leaf).then(|| Mapping {
            gpa: base,
            pfn: F::frame(raw, page_size),
            page_size,
            attributes: F::attributes(raw, page_size),
        })
    }
}

/// Whether every entry of the table is a leaf of the run that starts at `first`, or, where `holes` are fine, absent.
pub(crate) enum Contents {
    /// Leaves of the run, so many.
    Run { leaves: u64 },
    /// A frozen entry.
    Frozen,
    /// A leaf of another frame.
    Other,
}

/// Compares a leaf table, whose lock is held, with a run of frames.
pub(crate) fn contents<F: Format>(page: &TablePage, first: Pfn) -> Contents {
    let mut leaves = 0;
    for (frame, word) in (first.number()..).zip(page.words()) {
        let raw = leaf::load(word);
        match state::<F>(raw, 1) {
            State::Leaf if F::frame(raw, PageSize::Size4K).number() == frame => leaves += 1,
            State::Absent => {}
            State::Frozen => return Contents::Frozen,
            _ => return Contents::Other,
        }
    }
    Contents::Run { leaves }
}
