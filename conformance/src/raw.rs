//! KVM's calls one by one, for scenarios that are about a call and not about the engine.

use premap::Gpa;
use premap_guest::{Access, Backing, Guest, GuestError, Kernel, Lent, Machine, Memory, Mode, Order, Slice};
use premap_kvm::abi::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap, kvm_pre_fault_memory,
    kvm_userspace_memory_region,
};
use premap_kvm::{Errno, Stats, Vcpu, Vm};

use crate::fixture::PAGE;
use crate::reach;

/// A slot, as `KVM_SET_USER_MEMORY_REGION` takes it, of memory in an [`Arena`].
#[derive(Clone, Copy, Debug)]
pub struct RawSlot {
    /// Its number, and its address space from bit 16 on.
    pub number: u32,
    /// Its flags.
    pub flags: u32,
    /// Where it begins in the guest.
    pub gpa: Gpa,
    /// How many pages it has; 0 deletes it.
    pub pages: u64,
    /// Where it begins in the arena, in pages.
    pub from: u64,
}

impl RawSlot {
    /// The slot in KVM's own struct.
    #[must_use]
    pub fn region(&self, memory: &Memory) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: self.number,
            flags: self.flags,
            guest_phys_addr: self.gpa.raw(),
            memory_size: self.pages * PAGE,
            userspace_addr: memory.hva().raw() + self.from * PAGE,
        }
    }
}

/// A machine, and memory of which the scenario makes slots as it likes. It has two vCPUs for the guest.
pub struct Arena<K: Kernel> {
    // Dropped in this order: the memory outlives the machine that was told of it.
    /// The machine.
    pub machine: Machine<K>,
    memory: Memory,
}

impl<K: Kernel> Arena<K> {
    /// Makes a machine without slots, and so many pages for them.
    pub fn new(kernel: &K, pages: u64, backing: Backing) -> Self {
        let machine = Machine::new(kernel, 2).expect("a machine can be made");
        Self { machine, memory: Memory::new(pages * PAGE, backing).expect("the memory can be had") }
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Writes a word to each of some pages, so that the host has them present and writable.
    pub fn fill(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            self.memory.write_word(page * PAGE, page + 1);
        }
    }

    /// Makes, changes or deletes a slot.
    ///
    /// # Errors
    /// What KVM gives.
    pub fn set(&self, slot: RawSlot) -> Result<(), Errno> {
        set(self.machine.vm(), &self.memory, &slot.region(&self.memory))
    }

    /// The same by KVM's own struct.
    ///
    /// # Errors
    /// What KVM gives.
    ///
    /// # Panics
    /// If the region lies neither in the arena nor [`NOWHERE`].
    pub fn set_region(&self, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
        set(self.machine.vm(), &self.memory, region)
    }

    /// [`set`](Self::set) for one thread, and the vCPUs for another.
    pub fn split(&mut self) -> (impl Fn(RawSlot) -> Result<(), Errno> + Sync, &mut [K::Vcpu]) {
        let Lent { vm, vcpus, .. } = self.machine.lend();
        let memory = &self.memory;
        (move |slot: RawSlot| set(vm, memory, &slot.region(memory)), vcpus)
    }

    /// Has KVM keep the other slots' mappings when one is deleted or moved.
    pub fn keep_mappings(&self) {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
        cap.args[0] = KVM_X86_QUIRK_SLOT_ZAP_ALL.into();
        self.machine.vm().enable_cap(&cap).expect("the quirk can be switched off");
    }

    /// A vCPU.
    pub fn vcpu(&mut self, index: usize) -> &mut K::Vcpu {
        &mut self.machine.lend().vcpus[index]
    }
}

/// An address below all that Linux gives to programs: nothing is ever mapped there.
pub const NOWHERE: u64 = PAGE;

fn set(vm: &impl Vm, arena: &Memory, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
    let offset = region.userspace_addr.wrapping_sub(arena.hva().raw());
    let inside = offset < arena.bytes() && region.memory_size <= arena.bytes() - offset;
    let nowhere = region.userspace_addr == NOWHERE && region.memory_size <= PAGE;
    assert!(inside || nowhere, "{region:?} is no memory of the arena");
    // SAFETY: the memory lies in the arena, which outlives the VM and is only reached atomically; or in a page that no
    // program has.
    #[expect(unsafe_code, reason = "hands the arena's memory to the VM")]
    unsafe {
        vm.set_user_memory_region(region)
    }
}

/// Calls `KVM_PRE_FAULT_MEMORY` once. Gives what came back and how many pages were left, and checks the core rule: an error
/// leaves the range as it was, and success moves its start by what was done, which is something.
pub fn pre_fault(vcpu: &mut impl Vcpu, gpa: Gpa, pages: u64) -> (Result<(), Errno>, u64) {
    let size = pages * PAGE;
    let mut range = kvm_pre_fault_memory { gpa: gpa.raw(), size, ..Default::default() };
    let result = vcpu.pre_fault_memory(&mut range);
    assert!(
        range.size <= size && range.size.is_multiple_of(PAGE),
        "{size:#x} bytes became {:#x}",
        range.size
    );
    assert_eq!(range.gpa, gpa.raw() + (size - range.size), "what is left is not the end of what was asked");
    assert_ne!(
        result.is_err(),
        range.size < size,
        "{result:?} with {:#x} of {size:#x} bytes left",
        range.size
    );
    (result, range.size / PAGE)
}

/// Pre-faults a range to its end.
pub fn pre_fault_all(vcpu: &mut impl Vcpu, gpa: Gpa, pages: u64) {
    let mut left = pages;
    while left > 0 {
        let at = gpa.wrapping_add((pages - left) * PAGE);
        let (result, rest) = pre_fault(vcpu, at, left);
        assert_eq!(result, Ok(()), "page {} of {pages}", pages - left);
        left = rest;
    }
}

/// Lets a guest touch pages in ascending order, and gives the sum of what it read. A write writes
/// [`word_of`](premap_guest::word_of) the page's number, which counts from `gpa`.
///
/// # Errors
/// Why the guest did not come to its end.
pub fn touch(vcpu: &mut impl Guest, gpa: Gpa, pages: u64, access: Access) -> Result<u64, GuestError> {
    vcpu.prepare(&Slice { gpa, first: 0, pages, access, order: Order::Ascending })?;
    vcpu.run()
}

/// A statistic of a vCPU.
pub fn count(vcpu: &impl Vcpu, name: &str) -> u64 {
    value(&vcpu.stats().expect("a vCPU has statistics"), name)
}

/// A statistic.
pub fn value(stats: &Stats, name: &str) -> u64 {
    stats.get(name).unwrap_or_else(|| panic!("there is no statistic {name}"))
}

/// Puts a vCPU into a mode, or says that this kernel can't and gives false. In the lab, Linux can.
pub fn can_enter<K: Kernel>(vcpu: &mut K::Vcpu, mode: Mode) -> bool {
    match vcpu.enter(mode) {
        Ok(()) => true,
        Err(error @ GuestError::NoMode { .. }) => {
            if K::NAME == premap_guest::Linux::NAME {
                reach::skip(&error.to_string());
            } else {
                eprintln!("skipped: {error}");
            }
            false
        }
        Err(error) => panic!("entering {mode}: {error}"),
    }
}
