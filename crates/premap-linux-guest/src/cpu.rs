//! What a vCPU knows and holds when the kernel is entered: CPUID, registers, segments and page tables.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_dtable, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use premap_address::{Gpa, PAGE_SIZE, PageSize};
use premap_guest::enter_long_mode;
use vm_memory::GuestMemoryMmap;

use crate::error::{LinuxGuestError, kvm};
use crate::layout::{BOOT_PARAMETERS, DESCRIPTORS, PAGE_TABLES};
use crate::load::write;

/// Null, null, 64-bit code at 0x10, data at 0x18.
const SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Present and writable; for a page directory's entry also: 2 MiB.
const TABLE: u64 = 0x3;
const LEAF: u64 = 0x83;

/// What every vCPU is told of itself, but for its number.
pub(crate) fn cpuid(machine: &Kvm) -> Result<CpuId, LinuxGuestError> {
    let mut cpuid =
        machine.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline_timer = machine.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
        // There is a hypervisor, and the timer is one that needs no calibration where KVM has it.
        entry.ecx |= 1 << 31 | u32::from(deadline_timer) << 24;
    }
    Ok(cpuid)
}

/// Sets the CPUID of vCPU `id` of `count`: one package, a core each, one thread a core.
pub(crate) fn set_cpuid(fd: &VcpuFd, cpuid: &CpuId, id: u8, count: u8) -> Result<(), LinuxGuestError> {
    let mut own = cpuid.clone();
    for entry in own.as_mut_slice() {
        name(entry, u32::from(id), u32::from(count));
    }
    fd.set_cpuid2(&own).map_err(kvm("KVM_SET_CPUID2"))
}

fn name(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    let bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        1 => entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24,
        0xb | 0x1f => {
            // Subleaf 0 is about threads, 1 about cores, in Intel's numbers of the kinds.
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (bits, count, 2 << 8 | 1),
                index => (0, 0, index),
            };
            entry.edx = id;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Writes the descriptors and page tables that the first vCPU enters the kernel with.
pub(crate) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), LinuxGuestError> {
    write(memory, DESCRIPTORS, &bytes(SEGMENTS))?;
    let next = |page: u64| PAGE_TABLES.wrapping_add(page * PAGE_SIZE);
    write(memory, next(0), &bytes([next(1).raw() | TABLE]))?;
    write(memory, next(1), &bytes([next(2).raw() | TABLE]))?;
    write(memory, next(2), &bytes((0..512).map(|index| (index * PageSize::Size2M.bytes()) | LEAF)))
}

fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Puts the first vCPU at the kernel's entry. The others wait for it to start them, as KVM has them.
pub(crate) fn enter(fd: &VcpuFd, entry: Gpa) -> Result<(), LinuxGuestError> {
    let mut sregs = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    enter_long_mode(&mut sregs, PAGE_TABLES);
    let limit = u16::try_from(size_of_val(&SEGMENTS) - 1).unwrap_or_default();
    sregs.gdt = kvm_dtable { base: DESCRIPTORS.raw(), limit, ..Default::default() };
    fd.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: entry.raw(), rsi: BOOT_PARAMETERS.raw(), rflags: 2, ..Default::default() };
    fd.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_that_names_a_vcpu_names_this_one() {
        let named = |function, index| {
            let mut entry = kvm_cpuid_entry2 { function, index, ebx: 0x1234, ..Default::default() };
            name(&mut entry, 2, 3);
            (entry.eax, entry.ebx, entry.ecx, entry.edx)
        };
        assert_eq!(named(1, 0), (0, 0x0203_1234, 0, 0));
        assert_eq!(named(0xb, 0), (0, 1, 0x100, 2));
        assert_eq!(named(0xb, 1), (2, 3, 0x201, 2));
        assert_eq!(named(0xb, 2), (0, 0, 2, 2));
        assert_eq!(named(0x8000_0008, 0), (0, 0x1234, 0x2002, 0));
        assert_eq!(named(7, 0), (0, 0x1234, 0, 0));
    }
}
