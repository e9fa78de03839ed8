//! The concurrency protocol: who may change an entry, when, and what others see of it.
//!
//! # Entries
//!
//! An entry of level 2 and above is always in one of these states, each spelled in the entry's own word:
//!
//! ```text
//!               lock                     publish / give back
//!   absent  ------------> absent+LOCK  ----------------------> table | leaf | absent
//!   table   ------------> table+LOCK   ----------------------> table | leaf | FROZEN
//!   leaf    ------------> leaf+LOCK    ----------------------> leaf | table | FROZEN
//!   FROZEN  --(its owner, after the flush)------------------->  absent | table | leaf
//!   DEAD    (the table that holds the entry was taken out: start again from the root)
//! ```
//!
//! * `LOCK` is one bit that hardware ignores in present entries and that a walker ignores too: a locked leaf still maps, a
//!   locked table is still walked. Only who set it changes the entry. **The lock of a leaf table is the bit in the entry
//!   that points to it**: who holds it may change the 512 entries of that table. So a mapper takes one lock for up to
//!   512 pages, the lock lies in a cache line that the walk has just read, and a table that was taken out can't be locked
//!   by mistake since its entry no longer leads to it.
//! * `FROZEN` maps nothing and belongs to an owed flush ([`Flush`](crate::Flush)). Nobody but its owner changes it; others are told
//!   and try again later. It pins the table it lies in: a table with a frozen entry is not taken out.
//! * `DEAD` fills a table of level 2 or above that was replaced by a larger leaf.
//!
//! An entry of level 1 has no lock of its own. It is absent, a leaf, or frozen; changed under its table's lock, except that
//! the owner of a frozen one thaws it without, and that the processor (or a software vCPU) sets accessed and dirty in a
//! present leaf at any moment. Hence a change of a present leaf is an atomic exchange, and of an absent entry a store.
//!
//! # Lock order
//!
//! One thread holds at most one leaf table. While it holds one it takes no other lock, except to collapse: the entry of
//! level 3 first, then every entry of its table in ascending order. Frames are allocated before a lock is taken or while
//! only an absent entry is locked, never from within a leaf table's lock.
//!
//! # What it guarantees
//!
//! 1. A walker takes no lock and never waits. It sees each entry as some mapper published it, the table behind a table
//!    entry wholly written, because entries are published by release stores and read by acquire loads; and no table goes
//!    away under it, because it holds a [grace period](crate::epoch) open.
//! 2. A leaf never becomes a leaf of another frame without a flush between: an unmapped entry stays frozen until the flush
//!    is said to be done, and every operation that finds a leaf of another frame refuses.
//! 3. A table is freed after it was unlinked, the flush done, and a grace period gone by.
//! 4. Who changes its own state (an invalidation sequence, say) before [`unmap`](crate::PageTable::unmap) and checks it
//!    under a leaf lock before mapping never leaves a stale mapping: either the check sees the new state or the unmap sees
//!    the new mapping. Where both take the same lock that follows from the lock; where a mapper links a new table while an
//!    unmapper finds nothing to lock, from a sequentially consistent fence on each side.
//!
//! 5. Operations are in one order block by block (of 2 MiB). To who takes the lock, an operation is done in a block whole
//!    or up to where it [stopped](crate::Stopped), and a range of several blocks is as many operations. Two things of it
//!    can be seen apart: the split of a large leaf of which it changes a part, which comes first and changes nothing that
//!    is mapped; and the end of its flush, until which what it took away is frozen. A page of a cursor is an operation of
//!    its own.
//! 6. To a walker, which takes no lock, the pages of a table change one by one in ascending order. At one moment it sees a
//!    large leaf change, a table come with all that was mapped with it, and a table go. A query is a walk of each page.
//!
//! Loom checks the first four on this very code (`tests/loom`, and the models in [`epoch`](crate::epoch)); 5 and 6 are what
//! the histories of `tests/linearizable` are held against.

pub(crate) mod leaf;

use core::marker::PhantomData;

use premap_address::{PageSize, Pfn};

use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::sync::{AtomicU64, Backoff, Ordering};
use crate::table::{NewTable, Spare};

/// In a present entry or an absent one of level 2 and above: someone changes it, or the leaf table behind it.
const LOCK: u64 = 1 << 55;
/// In an entry that is not present: an owed flush holds it.
const FROZEN: u64 = 1 << 56;
/// In an entry that is not present: its table was taken out of the tree.
const DEAD: u64 = 1 << 57;

/// What an entry is, without its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Absent,
    Frozen,
    Dead,
    Table,
    Leaf,
}

/// The state that a word of this level spells.
#[inline]
pub(crate) fn state<F: Format>(raw: u64, level: u8) -> State {
    if F::is_present(raw) {
        if level > 1 && F::is_table(raw) { State::Table } else { State::Leaf }
    } else if raw & FROZEN != 0 {
        State::Frozen
    } else if raw & DEAD != 0 {
        State::Dead
    } else {
        State::Absent
    }
}

/// The word of a frozen entry.
#[inline]
pub(crate) const fn frozen<F: Format>() -> u64 {
    F::ABSENT | FROZEN
}

/// The word of an entry in a table that was taken out.
#[inline]
pub(crate) const fn dead<F: Format>() -> u64 {
    F::ABSENT | DEAD
}

/// A table that an entry led to when it was read. Nothing makes one but reading an entry, or holding its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Linked<'g> {
    frame: Pfn,
    entry: PhantomData<&'g AtomicU64>,
}

impl<'g> Linked<'g> {
    /// The table that an entry of level 2 or above spells, if it spells one.
    #[inline]
    fn spelled<F: Format>(raw: u64) -> Option<Self> {
        let linked = || Self { frame: F::frame(raw, PageSize::Size4K), entry: PhantomData };
        F::is_table(raw).then(linked)
    }

    #[inline]
    pub(crate) fn frame(self) -> Pfn {
        self.frame
    }
}

/// A table that was taken out of the tree, or never came into it: no entry leads to it.
#[derive(Debug)]
pub(crate) struct Removed(Pfn);

impl Removed {
    /// The table that a frozen entry was to lead to, and won't, since its flush is dropped.
    pub(crate) fn never_linked<F: Format>(thawed: u64) -> Option<Self> {
        Linked::spelled::<F>(thawed).map(|table| Self(table.frame))
    }

    pub(crate) fn into_frame(self) -> Pfn {
        self.0
    }
}

/// An entry of any level as a walker sees it, without its lock bit, and the table that it leads to.
#[inline]
pub(crate) fn look<F: Format>(word: &AtomicU64, level: u8) -> (u64, Option<Linked<'_>>) {
    if level == 1 { (leaf::load(word), None) } else { Slot::<F>::new(word).look() }
}

/// An entry of level 2 or above.
pub(crate) struct Slot<'g, F> {
    word: &'g AtomicU64,
    format: PhantomData<F>,
}

impl<F> Clone for Slot<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Slot<'_, F> {}

/// Why an entry can't be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unlockable {
    /// It belongs to an owed flush.
    Frozen,
    /// Its table was taken out; start again from the root.
    Dead,
}

impl<'g, F: Format> Slot<'g, F> {
    #[inline]
    pub(crate) fn new(word: &'g AtomicU64) -> Self {
        Self { word, format: PhantomData }
    }

    /// The entry as a walker sees it, without its lock bit, and the table that it leads to.
    #[inline]
    pub(crate) fn look(self) -> (u64, Option<Linked<'g>>) {
        let raw = self.word.load(Ordering::Acquire) & !LOCK;
        (raw, Linked::spelled::<F>(raw))
    }

    /// Publishes a table in an absent entry, without taking the lock, or gives the table back.
    #[inline]
    pub(crate) fn publish_if_absent(self, table: NewTable<'_, impl FrameAllocator>) -> bool {
        let raw = F::table(table.frame());
        let absent = self.word.compare_exchange(F::ABSENT, raw, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if absent {
            table.into_frame();
        }
        absent
    }

    /// Whether the entry is absent and nobody holds its lock.
    #[inline]
    pub(crate) fn is_idle(self) -> bool {
        self.word.load(Ordering::Acquire) == F::ABSENT
    }

    /// Takes the lock of an entry that was just seen as `raw`, at the first try or not at all.
    #[inline]
    pub(crate) fn try_lock_seen(self, raw: u64) -> Option<Locked<'g, F>> {
        self.word
            .compare_exchange(raw, raw | LOCK, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            // Not `then_some`: that would make a guard, and drop it, where the lock is another's.
            .then(|| Locked { slot: self, value: raw })
    }

    /// Takes the entry's lock, spinning while another has it.
    ///
    /// # Errors
    /// The entry is frozen or dead.
    #[inline]
    pub(crate) fn lock(self) -> Result<Locked<'g, F>, Unlockable> {
        let mut backoff = Backoff::new();
        let mut raw = self.word.load(Ordering::Relaxed);
        loop {
            if !F::is_present(raw) {
                if raw & FROZEN != 0 {
                    return Err(Unlockable::Frozen);
                }
                if raw & DEAD != 0 {
                    return Err(Unlockable::Dead);
                }
            }
            if raw & LOCK != 0 {
                backoff.wait();
                raw = self.word.load(Ordering::Relaxed);
                continue;
            }
            // Acquire: sees what the holder before did to the table, and the table itself as its maker wrote it.
            match self.word.compare_exchange(raw, raw | LOCK, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(Locked { slot: self, value: raw }),
                Err(now) => raw = now,
            }
        }
    }
}

/// An entry of level 2 or above whose lock is held. Dropping it gives the entry back as it was.
#[must_use]
pub(crate) struct Locked<'g, F: Format> {
    slot: Slot<'g, F>,
    value: u64,
}

impl<'g, F: Format> Locked<'g, F> {
    /// The entry as it was when it was locked, without the lock bit. Of a leaf, accessed and dirty may be set meanwhile.
    #[inline]
    pub(crate) fn value(&self) -> u64 {
        self.value
    }

    /// The table that the entry leads to.
    #[inline]
    pub(crate) fn below(&self) -> Option<Linked<'g>> {
        Linked::spelled::<F>(self.value)
    }

    /// Gives the entry back with a new value. The old one is not a leaf.
    #[inline]
    pub(crate) fn publish(self, raw: u64) {
        debug_assert!(!self.is_leaf());
        self.slot.word.store(raw, Ordering::Release);
        core::mem::forget(self);
    }

    /// Takes out the table that the entry leads to, if it leads to one, and gives the entry back with a new value.
    #[inline]
    pub(crate) fn unlink(self, raw: u64) -> Option<Removed> {
        let Some(table) = self.below() else {
            self.exchange(raw);
            return None;
        };
        self.publish(raw);
        Some(Removed(table.frame))
    }

    /// Publishes a table in the entry and keeps the lock. The entry was absent.
    #[inline]
    pub(crate) fn publish_locked(self, table: NewTable<'_, impl FrameAllocator>) -> Self {
        debug_assert!(!F::is_present(self.value));
        let raw = F::table(table.into_frame());
        let slot = self.slot;
        slot.word.store(raw | LOCK, Ordering::Release);
        core::mem::forget(self);
        Self { slot, value: raw }
    }

    /// Gives the entry back with a new value and returns the old one with its last accessed and dirty bits.
    #[inline]
    pub(crate) fn exchange(self, raw: u64) -> u64 {
        let old = self.slot.word.swap(raw, Ordering::AcqRel) & !LOCK;
        core::mem::forget(self);
        old
    }

    /// Gives a leaf's entry back with a table in its place.
    ///
    /// # Errors
    /// The processor changed the leaf since it was locked or last asked for: the entry is given back to the caller, still
    /// locked, with what the leaf is now, and the table to be written anew.
    #[inline]
    pub(crate) fn replace<'a, A: FrameAllocator>(
        mut self,
        table: NewTable<'a, A>,
    ) -> Result<(), (Self, Spare<'a, A>)> {
        let raw = F::table(table.frame());
        let exchanged =
            self.slot.word.compare_exchange(self.value | LOCK, raw, Ordering::AcqRel, Ordering::Relaxed);
        match exchanged {
            Ok(_) => {
                core::mem::forget(self);
                table.into_frame();
                Ok(())
            }
            Err(now) => {
                self.value = now & !LOCK;
                Err((self, table.into_spare()))
            }
        }
    }

    /// Gives a leaf back as `change` makes it, again if the processor changed it meanwhile; returns old and new.
    #[inline]
    pub(crate) fn update(self, change: impl FnMut(u64) -> u64) -> (u64, u64) {
        let changed = update(self.slot.word, change);
        core::mem::forget(self);
        changed
    }

    /// Whether the value held is a present leaf; only these change under the lock.
    #[inline]
    fn is_leaf(&self) -> bool {
        F::is_present(self.value) && !F::is_table(self.value)
    }
}

impl<F: Format> Drop for Locked<'_, F> {
    #[inline]
    fn drop(&mut self) {
        if self.is_leaf() {
            self.slot.word.fetch_and(!LOCK, Ordering::Release);
        } else {
            self.slot.word.store(self.value, Ordering::Release);
        }
    }
}

/// Replaces a word by what `change` makes of it (without the lock bit, on both sides); returns old and new.
#[inline]
fn update(word: &AtomicU64, mut change: impl FnMut(u64) -> u64) -> (u64, u64) {
    let mut raw = word.load(Ordering::Relaxed);
    loop {
        let new = change(raw & !LOCK);
        match word.compare_exchange_weak(raw, new, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return (raw & !LOCK, new),
            Err(now) => raw = now,
        }
    }
}

/// The entry of a walker or of the processor: notes a use in a leaf of any level if the leaf still is what was walked to.
#[inline]
pub(crate) fn touch(word: &AtomicU64, seen: u64, touched: u64) -> bool {
    // The lock bit is not the walker's to change: it is kept as found, locked or not.
    let mut raw = word.load(Ordering::Relaxed);
    while raw & !LOCK == seen {
        let new = touched | raw & LOCK;
        match word.compare_exchange_weak(raw, new, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(now) => raw = now,
        }
    }
    false
}

/// Thaws an entry that an owed flush froze: the owner's right, and no lock is needed.
#[inline]
pub(crate) fn thaw(word: &AtomicU64, raw: u64) {
    word.store(raw, Ordering::Release);
}
