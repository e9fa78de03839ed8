//! The control slot: the guest's code and page tables, in guest memory from gpa 0.
//!
//! ```text
//!   page 0   page 1   page 2   page 3 + g                   page 515      page 516
//!   code     PML4     PDPT     PD of GiB g: 512 identity    nested PML4   nested PDPT: 512 identity
//!                              mappings of 2 MiB                          mappings of 1 GiB
//! ```
//!
//! Page directories are filled as slices need them, so that a small guest has few. The nested tables are those of an L1 for
//! its L2. They can't be the same pages: KVM write-protects what it shadows, and each step of a walk through L2's own tables
//! counts as a write.

use kvm_bindings::{kvm_segment, kvm_sregs};
use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize};
use premap_kvm::Vm;
use premap_kvm::abi::kvm_userspace_memory_region;

use super::code;
use crate::backing::Backing;
use crate::error::{GuestError, MachineError, call};
use crate::memory::Memory;

pub(crate) const PML4: u64 = PAGE_SIZE;
const PDPT: u64 = 2 * PAGE_SIZE;
/// As many as one PDPT points to, which is one GiB each.
const DIRECTORIES: u64 = 512;
const GIB: u64 = PageSize::Size1G.bytes();
pub(crate) const NESTED_PML4: u64 = directory(DIRECTORIES);
const NESTED_PDPT: u64 = NESTED_PML4 + PAGE_SIZE;
const END: u64 = NESTED_PDPT + PAGE_SIZE;

/// Far above what a machine's own slots are numbered with, and below the lowest limit that x86 ever had.
pub(crate) const SLOT: u32 = 500;

/// Present, writable, accessed: set ahead, so that no walk has to write the tables.
const TABLE: u64 = 0x23;
/// The same and dirty, a huge page.
const LEAF: u64 = 0xe3;
/// For user accesses, as every one is that a nested table translates.
const USER: u64 = 4;

/// The memory of a VM's control slot.
#[derive(Debug)]
pub(crate) struct Control {
    memory: Memory,
}

impl Control {
    /// Makes the code and the tables down to the page directory of the first GiB, which holds this slot.
    pub(crate) fn new() -> Result<Self, MachineError> {
        let control = Self { memory: Memory::new(END, Backing::Anonymous)? };
        for (index, bytes) in (0..).zip(code::bytes().chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            control.memory.write_word(8 * index, u64::from_le_bytes(word));
        }
        control.memory.write_word(PML4, PDPT | TABLE);
        control.fill(0);
        control.memory.write_word(NESTED_PML4, NESTED_PDPT | TABLE | USER);
        for gib in 0..DIRECTORIES {
            control.memory.write_word(NESTED_PDPT + 8 * gib, (gib * GIB) | LEAF | USER);
        }
        Ok(control)
    }

    pub(crate) fn into_memory(self) -> Memory {
        self.memory
    }

    /// Tells `vm` of the slot in one of its address spaces: 0 the normal one, 1 that of system management mode.
    // UNSAFETY: KVM_SET_USER_MEMORY_REGION, whose contract the owners of this memory keep.
    #[expect(unsafe_code, reason = "hands owned memory to KVM")]
    pub(crate) fn add_to(&self, vm: &impl Vm, space: u32) -> Result<(), MachineError> {
        let region = kvm_userspace_memory_region {
            slot: space << 16 | SLOT,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.memory.bytes(),
            userspace_addr: self.memory.hva().raw(),
        };
        // SAFETY: this memory is only reached atomically, and lives as long as a guest can run: on `/dev/kvm` every vCPU
        // holds it until its descriptor is closed, and on the software KVM it goes by way of `give_back`.
        unsafe { vm.set_user_memory_region(&region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Lets the guest reach `range` under its own addresses, and gives the part of the slot in use.
    pub(crate) fn map(&self, range: GpaRange) -> Result<GpaRange, GuestError> {
        let last = range.end().wrapping_add(PAGE_SIZE.wrapping_neg()).raw() / GIB;
        if range.start().raw() < 4 * GIB || last >= DIRECTORIES {
            return Err(GuestError::OutOfReach(range));
        }
        for gib in range.start().raw() / GIB..=last {
            self.fill(gib);
        }
        Ok(GpaRange::new(Gpa::new(0), directory(last + 1)))
    }

    /// Fills the page directory of one GiB, the same way every time, so many threads may do it at once.
    fn fill(&self, gib: u64) {
        let page = PageSize::Size2M.bytes();
        for index in 0..GIB / page {
            self.memory.write_word(directory(gib) + 8 * index, (gib * GIB + index * page) | LEAF);
        }
        self.memory.write_word(PDPT + 8 * gib, directory(gib) | TABLE);
    }
}

/// Where the page directory of a GiB lies.
const fn directory(gib: u64) -> u64 {
    (3 + gib) * PAGE_SIZE
}

/// The code's address.
pub(super) const ENTRY: u64 = 0;

/// Puts a vCPU into 64-bit mode at the highest privilege, on the page tables at `tables` in the guest, with the flat
/// segments and the selectors that Linux's boot protocol asks for.
pub fn enter_long_mode(sregs: &mut kvm_sregs, tables: Gpa) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    const CR0_NE: u64 = 1 << 5;
    const CR0_WP: u64 = 1 << 16;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = tables.raw();
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    let flat = kvm_segment { limit: u32::MAX, present: 1, g: 1, ..Default::default() };
    let code = kvm_segment { selector: 0x10, type_: 0xb, s: 1, l: 1, ..flat };
    let data = kvm_segment { selector: 0x18, type_: 0x3, s: 1, db: 1, ..flat };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // VMX demands a busy 64-bit task segment even of a guest that has no task.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest-physical address that the tables give for a guest-virtual one, as hardware walks them.
    fn walk(control: &Control, address: u64) -> Option<u64> {
        let mut table = PML4;
        for level in [39, 30, 21] {
            let entry = control.memory.read_word(table + 8 * (address >> level & 511));
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        Some(table | address & (PageSize::Size2M.bytes() - 1))
    }

    #[test]
    fn the_guest_sees_the_control_slot_and_what_was_mapped_and_nothing_else() {
        let control = Control::new().unwrap();
        let used = control.map(GpaRange::new(Gpa::new(4 * GIB), GIB + PAGE_SIZE)).unwrap();
        assert_eq!(used, GpaRange::new(Gpa::new(0), directory(6)));
        for address in [0, directory(5), 4 * GIB, 5 * GIB - 8, 5 * GIB + 0x1234] {
            assert_eq!(walk(&control, address), Some(address), "{address:#x}");
        }
        for address in [GIB, 4 * GIB - 8, 6 * GIB, 512 * GIB] {
            assert_eq!(walk(&control, address), None, "{address:#x}");
        }
    }

    #[test]
    fn what_the_guest_cannot_reach_is_refused() {
        let control = Control::new().unwrap();
        for (gpa, bytes) in [(0, PAGE_SIZE), (511 * GIB, GIB + PAGE_SIZE), (!0 << 20, PAGE_SIZE)] {
            let range = GpaRange::new(Gpa::new(gpa), bytes);
            assert_eq!(control.map(range), Err(GuestError::OutOfReach(range)));
        }
    }
}
