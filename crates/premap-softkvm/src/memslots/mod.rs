//! Memslots: which guest-physical memory lies where in the VMM's address space.
//!
//! **Protocol.** The slots are a snapshot that is never changed, only replaced. A reader takes it whole and keeps it as
//! long as it likes; between [`Memslots::enter`] and the end of that section it may take it again and see a newer one. A
//! writer holds the slots lock throughout, publishes, and then waits for every section that began before.
//!
//! A slot that is deleted or moved is published as [`State::Dying`] first. When everyone has seen that, its mappings are
//! taken away, and only then it goes: no mapping can be made of a slot that is gone.

mod change;
mod dirty;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use premap_address::{Gfn, Hva, PAGE_SIZE, PageSize};

pub(crate) use change::{Change, Limits, plan};
pub(crate) use dirty::DirtyLog;

use crate::private::PrivateMemory;
use crate::srcu::{Reading, Srcu};

/// How many slots an address space has for user space: `KVM_USER_MEM_SLOTS` on x86.
pub(crate) const USER_SLOTS: u32 = 32_764;
/// Normal and SMM.
pub(crate) const ADDRESS_SPACES: u32 = 2;

/// One of the two address spaces, and the number of a slot in it: the `slot` field of KVM's structs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotId {
    pub(crate) space: AddressSpace,
    number: u16,
}

/// What a vCPU sees: its slots in normal operation, or those in system management mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum AddressSpace {
    Normal,
    Smm,
}

impl SlotId {
    /// The id that KVM's structs spell as the number in bits 0 to 15 and the address space above.
    pub(crate) fn parse(raw: u32) -> Option<Self> {
        let space = match raw >> 16 {
            0 => AddressSpace::Normal,
            1 => AddressSpace::Smm,
            _ => return None,
        };
        let number = raw & 0xffff;
        (number < USER_SLOTS).then_some(Self { space, number: u16::try_from(number).ok()? })
    }
}

/// What a guest may do with a slot's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Writable,
    ReadOnly,
}

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Live,
    /// About to be deleted or moved: `KVM_MEMSLOT_INVALID`.
    Dying,
}

/// A memslot.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) base: Gfn,
    pub(crate) pages: u64,
    pub(crate) hva: Hva,
    pub(crate) protection: Protection,
    pub(crate) state: State,
    /// There where the slot's pages can be private.
    pub(crate) private: Option<PrivateMemory>,
    /// There while dirty logging is on.
    pub(crate) dirty: Option<Arc<DirtyLog>>,
}

impl Slot {
    pub(crate) fn end(&self) -> Gfn {
        Gfn::new(self.base.number() + self.pages)
    }

    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        (self.base..self.end()).contains(&gfn)
    }

    /// Where the page lies in the VMM's address space. The page is in the slot.
    pub(crate) fn hva(&self, gfn: Gfn) -> Hva {
        debug_assert!(self.contains(gfn));
        self.hva.wrapping_add((gfn.number() - self.base.number()) * PAGE_SIZE)
    }

    /// The largest mapping that the slot permits at a page: both addresses congruent, the whole of it in the slot, and
    /// dirty logging off, since that counts small pages.
    pub(crate) fn largest(&self, gfn: Gfn) -> PageSize {
        if self.dirty.is_some() {
            return PageSize::Size4K;
        }
        let fits = |size: &PageSize| {
            let start = gfn.align_down(*size);
            let congruent = (self.base.number() ^ (self.hva.raw() / PAGE_SIZE)).is_multiple_of(size.pages());
            congruent && start >= self.base && start.number() + size.pages() <= self.end().number()
        };
        PageSize::ALL.into_iter().rev().find(fits).unwrap_or(PageSize::Size4K)
    }

    /// Notes that pages may have been written, where that is logged.
    pub(crate) fn mark_dirty(&self, gfn: Gfn, pages: u64) {
        if let Some(log) = &self.dirty {
            log.mark(gfn.number() - self.base.number(), pages);
        }
    }

    fn with_state(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }
}

/// All slots at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    /// Counts publications; an MMIO mapping of an older generation is not believed.
    pub(crate) generation: u64,
    /// By address space, in ascending order of their first page.
    spaces: [Vec<Arc<Slot>>; ADDRESS_SPACES as usize],
}

impl Snapshot {
    fn space(&self, space: AddressSpace) -> &Vec<Arc<Slot>> {
        &self.spaces[space as usize]
    }

    /// The slot that holds the page.
    pub(crate) fn find(&self, space: AddressSpace, gfn: Gfn) -> Option<&Arc<Slot>> {
        let slots = self.space(space);
        let after = slots.partition_point(|slot| slot.base <= gfn);
        slots[..after].last().filter(|slot| slot.contains(gfn))
    }

    /// The slot of this id.
    pub(crate) fn get(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.space(id.space).iter().find(|slot| slot.id == id)
    }

    /// Every slot of every address space.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.spaces.iter().flatten()
    }

    /// This with a slot taken out and another put in.
    pub(crate) fn replaced(&self, out: Option<SlotId>, new: Option<Slot>) -> Self {
        let mut snapshot = Self { generation: self.generation + 1, ..self.clone() };
        if let Some(id) = out {
            snapshot.spaces[id.space as usize].retain(|slot| slot.id != id);
        }
        if let Some(slot) = new {
            let slots = &mut snapshot.spaces[slot.id.space as usize];
            slots.insert(slots.partition_point(|other| other.base < slot.base), Arc::new(slot));
        }
        snapshot
    }

    /// This with a slot about to go.
    pub(crate) fn dying(&self, slot: &Slot) -> Self {
        self.replaced(Some(slot.id), Some(slot.with_state(State::Dying)))
    }
}

/// The slots of a VM.
#[derive(Debug, Default)]
pub(crate) struct Memslots {
    current: RwLock<Arc<Snapshot>>,
    readers: Srcu,
    /// KVM's `slots_lock`: one change at a time, and no snapshot of the dirty log meanwhile.
    lock: Mutex<()>,
}

impl Memslots {
    /// Begins a section in which the slots are read. A change that is published later waits for its end.
    pub(crate) fn enter(&self) -> Reading {
        self.readers.enter()
    }

    /// The slots as they are now.
    pub(crate) fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The right to change the slots. Taken before any other lock of the VM.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the slots. The caller holds [`lock`](Self::lock), and calls [`synchronize`](Self::synchronize) before it
    /// relies on everyone having seen them.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
    }

    /// Waits for every section that began before.
    pub(crate) fn synchronize(&self) {
        self.readers.synchronize();
    }
}

#[cfg(test)]
mod tests;
