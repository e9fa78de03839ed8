//! The memslots of a machine and the memory in them.
//!
//! A slot owns its [`Memory`] from the moment that KVM is told of it until KVM has deleted the slot: this is what makes
//! handing it to KVM safe. The machine's end alone would not do, since a VM may outlive its machine: by a clone of its
//! handle, or by a vCPU that was swapped into another machine.
// UNSAFETY: KVM_SET_USER_MEMORY_REGION, whose contract is the ownership above.
#![expect(unsafe_code, reason = "hands owned memory to KVM")]

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{BitOr, Range};

use premap_address::{Gpa, GpaRange};
use premap_kvm::Vm;
use premap_kvm::abi::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};

use crate::error::{MachineError, MemoryError, call};
use crate::machine::MachineVm;
use crate::memory::Memory;

/// The number of a memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u32);

impl SlotId {
    /// The number that KVM knows it by.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a memslot is marked with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags(u32);

impl SlotFlags {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The guest may not write it.
    pub const READ_ONLY: Self = Self(KVM_MEM_READONLY);
    /// KVM logs which pages are written.
    pub const LOG_DIRTY: Self = Self(KVM_MEM_LOG_DIRTY_PAGES);
}

impl BitOr for SlotFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A memslot: where it lies, what it is marked with, and its memory.
#[derive(Debug)]
pub struct Slot {
    gpa: Gpa,
    flags: SlotFlags,
    memory: Memory,
}

impl Slot {
    /// The guest addresses that it covers.
    #[must_use]
    pub fn range(&self) -> GpaRange {
        GpaRange::new(self.gpa, self.memory.bytes())
    }

    /// What it is marked with.
    #[must_use]
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn into_memory(self) -> Memory {
        self.memory
    }

    fn region(&self, id: SlotId) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: id.0,
            flags: self.flags.0,
            guest_phys_addr: self.gpa.raw(),
            memory_size: self.memory.bytes(),
            userspace_addr: self.memory.hva().raw(),
        }
    }
}

/// A machine's slots, together with the VM that they belong to.
#[derive(Debug)]
pub struct Slots<'a, V> {
    vm: &'a V,
    map: &'a mut BTreeMap<SlotId, Slot>,
}

impl<'a, V: MachineVm> Slots<'a, V> {
    pub(crate) fn new(vm: &'a V, map: &'a mut BTreeMap<SlotId, Slot>) -> Self {
        Self { vm, map }
    }

    /// Makes a slot of `memory` at `gpa`, under the lowest number that is free.
    ///
    /// # Errors
    /// EEXIST where it overlaps another slot, EINVAL for an unaligned address.
    pub fn add(&mut self, gpa: Gpa, memory: Memory, flags: SlotFlags) -> Result<SlotId, MachineError> {
        let taken = self.map.keys().zip(0..).take_while(|(id, number)| id.0 == *number).count();
        let id = SlotId(u32::try_from(taken).unwrap_or(u32::MAX));
        let slot = Slot { gpa, flags, memory };
        self.tell(&slot.region(id))?;
        self.map.insert(id, slot);
        Ok(id)
    }

    /// Deletes a slot and gives its memory back.
    ///
    /// # Errors
    /// No such slot, or what KVM gives.
    pub fn remove(&mut self, id: SlotId) -> Result<Memory, MachineError> {
        let slot = self.map.remove(&id).ok_or(MachineError::NoSlot(id.0))?;
        if let Err(error) = self.tell(&kvm_userspace_memory_region { memory_size: 0, ..slot.region(id) }) {
            self.map.insert(id, slot);
            return Err(error);
        }
        Ok(slot.memory)
    }

    /// Marks a slot anew.
    ///
    /// # Errors
    /// No such slot, or what KVM gives: EINVAL, since read-only can't be changed.
    pub fn set_flags(&mut self, id: SlotId, flags: SlotFlags) -> Result<(), MachineError> {
        let slot = self.map.get(&id).ok_or(MachineError::NoSlot(id.0))?;
        self.tell(&kvm_userspace_memory_region { flags: flags.0, ..slot.region(id) })?;
        self.map.entry(id).and_modify(|slot| slot.flags = flags);
        Ok(())
    }

    /// Gives pages of a slot back to the host, as [`Memory::discard`] does.
    ///
    /// # Errors
    /// No such slot, or what madvise gives.
    pub fn discard(&mut self, id: SlotId, part: Range<u64>) -> Result<(), MachineError> {
        self.change(id, |memory| memory.discard(part))
    }

    /// Takes a part of a slot's memory away for good, as [`Memory::revoke`] does: the guest's touches of it fail.
    ///
    /// # Errors
    /// No such slot, or what mmap gives.
    pub fn revoke(&mut self, id: SlotId, part: Range<u64>) -> Result<(), MachineError> {
        self.change(id, |memory| memory.revoke(part))
    }

    fn change(
        &mut self,
        id: SlotId,
        change: impl FnOnce(&mut Memory) -> Result<(), MemoryError>,
    ) -> Result<(), MachineError> {
        let memory = &mut self.map.get_mut(&id).ok_or(MachineError::NoSlot(id.0))?.memory;
        let range = memory.hva()..memory.hva().wrapping_add(memory.bytes());
        Ok(self.vm.change_host_memory(&range, || change(memory))?)
    }

    /// A slot.
    #[must_use]
    pub fn get(&self, id: SlotId) -> Option<&Slot> {
        self.map.get(&id)
    }

    /// The slots by number.
    pub fn iter(&self) -> impl Iterator<Item = (SlotId, &Slot)> {
        self.map.iter().map(|(id, slot)| (*id, slot))
    }

    fn tell(&self, region: &kvm_userspace_memory_region) -> Result<(), MachineError> {
        // SAFETY: the region is a `Memory`'s, which is only ever reached atomically and which a slot in `map` owns until
        // KVM has deleted it; `Machine` gives the memory of those that are left to `give_back`.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// Deletes the slots that show `memory` to a VM, and frees it when all are gone.
///
/// Where KVM did not delete one, the memory is never freed: whoever still has the VM could have a guest touch what lies
/// there next.
pub(crate) fn give_back(vm: &impl Vm, slots: impl IntoIterator<Item = u32>, memory: Memory) {
    for slot in slots {
        let deletion = kvm_userspace_memory_region { slot, ..Default::default() };
        // SAFETY: a region of no bytes deletes a slot and hands no memory over.
        if unsafe { vm.set_user_memory_region(&deletion) }.is_err() {
            return std::mem::forget(memory);
        }
    }
}
