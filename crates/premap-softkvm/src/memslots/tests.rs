use premap_address::Gpa;
use premap_kvm::Errno;
use premap_kvm::abi::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region2};

use super::*;

const LIMITS: Limits = Limits { gpa_end: Gpa::new(1 << 40), private_memory: false };
const MIB: u64 = 1 << 20;

fn region(slot: u32, flags: u32, gpa: u64, size: u64, hva: u64) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: hva,
        ..Default::default()
    }
}

fn no_private_memory(slot: &Slot) -> Result<PrivateMemory, Errno> {
    panic!("{slot:?} was not asked to have private memory")
}

/// Slot 0: 4 MiB at 16 MiB, writable. Slot 1: 1 MiB at 32 MiB, read-only.
fn slots() -> Snapshot {
    let mut slots = Snapshot::default();
    for region in [region(0, 0, 16 * MIB, 4 * MIB, 1 << 30), region(1, 2, 32 * MIB, MIB, 1 << 31)] {
        let Ok(Change::Create(slot)) = plan(&slots, &region, LIMITS, no_private_memory) else {
            panic!("{region:?}")
        };
        slots = slots.replaced(None, Some(slot));
    }
    slots
}

fn check(what: &str, region: kvm_userspace_memory_region2, expected: Result<&str, Errno>) {
    let found = plan(&slots(), &region, LIMITS, no_private_memory).map(|change| match change {
        Change::Nothing => "nothing",
        Change::Create(_) => "create",
        Change::Delete(_) => "delete",
        Change::Move { .. } => "move",
        Change::Flags { .. } => "flags",
    });
    assert_eq!(found, expected, "{what}");
}

#[test]
fn each_request_is_what_the_kernel_makes_of_it() {
    let hva = 1 << 32;
    check("a new slot", region(2, 0, 0, MIB, hva), Ok("create"));
    check("the same number in the other address space", region(0x1_0000, 0, 0, MIB, hva), Ok("create"));
    check(
        "the same memory in the other address space",
        region(0x1_0007, 0, 16 * MIB, MIB, hva),
        Ok("create"),
    );
    check("the slot as it is", region(0, 0, 16 * MIB, 4 * MIB, 1 << 30), Ok("nothing"));
    check("size 0", region(0, 0, 0, 0, 0), Ok("delete"));
    check("elsewhere", region(0, 0, 64 * MIB, 4 * MIB, 1 << 30), Ok("move"));
    check("onto itself, shifted", region(0, 0, 17 * MIB, 4 * MIB, 1 << 30), Ok("move"));
    check("logging on", region(0, KVM_MEM_LOG_DIRTY_PAGES, 16 * MIB, 4 * MIB, 1 << 30), Ok("flags"));
    check("logging on and moved", region(0, KVM_MEM_LOG_DIRTY_PAGES, 0, 4 * MIB, 1 << 30), Ok("move"));
}

#[test]
fn each_wrong_request_gets_the_kernels_errno() {
    let hva = 1 << 32;
    check("unknown flag", region(2, 1 << 7, 0, MIB, hva), Err(Errno::INVAL));
    check("guest_memfd flag in the old ioctl", region(2, 1 << 2, 0, MIB, hva), Err(Errno::INVAL));
    check("unaligned size", region(2, 0, 0, MIB + 1, hva), Err(Errno::INVAL));
    check("unaligned gpa", region(2, 0, 1, MIB, hva), Err(Errno::INVAL));
    check("unaligned hva", region(2, 0, 0, MIB, hva + 1), Err(Errno::INVAL));
    check("hva beyond user space", region(2, 0, 0, MIB, 1 << 63), Err(Errno::INVAL));
    check("gpa wraps", region(2, 0, !0xfff, MIB, hva), Err(Errno::INVAL));
    check("gpa beyond the processor", region(2, 0, (1 << 40) - 4096, 2 * 4096, hva), Err(Errno::INVAL));
    check("a third address space", region(0x2_0000, 0, 0, MIB, hva), Err(Errno::INVAL));
    check("too high a number", region(USER_SLOTS, 0, 0, MIB, hva), Err(Errno::INVAL));
    check("deletes what is not there", region(2, 0, 0, 0, hva), Err(Errno::INVAL));
    check("resizes", region(0, 0, 16 * MIB, 8 * MIB, 1 << 30), Err(Errno::INVAL));
    check("other host memory", region(0, 0, 16 * MIB, 4 * MIB, 1 << 31), Err(Errno::INVAL));
    check("turns read-only", region(0, KVM_MEM_READONLY, 16 * MIB, 4 * MIB, 1 << 30), Err(Errno::INVAL));
    check("overlaps", region(2, 0, 19 * MIB, 2 * MIB, hva), Err(Errno::EXIST));
    check("holds another", region(2, 0, 0, 64 * MIB, hva), Err(Errno::EXIST));
    check("moves onto another", region(0, 0, 30 * MIB, 4 * MIB, 1 << 30), Err(Errno::EXIST));
}

#[test]
fn slots_are_found_by_page_and_only_there() {
    let slots = slots();
    let id = |mib: u64| {
        slots
            .find(AddressSpace::Normal, Gpa::new(mib * MIB).frame())
            .map(|slot| slot.base.address().raw() / MIB)
    };
    assert_eq!([15, 16, 19, 20, 32, 33].map(id), [None, Some(16), Some(16), None, Some(32), None]);
    assert!(slots.find(AddressSpace::Smm, Gpa::new(16 * MIB).frame()).is_none());
}

#[test]
fn the_largest_mapping_follows_alignment_extent_and_logging() {
    let largest = |gpa: u64, size: u64, hva: u64, flags: u32, at: u64| {
        let Ok(Change::Create(slot)) =
            plan(&Snapshot::default(), &region(0, flags, gpa, size, hva), LIMITS, no_private_memory)
        else {
            panic!()
        };
        slot.largest(Gpa::new(at).frame())
    };
    let (mib2, gib) = (2 * MIB, 1 << 30);
    assert_eq!(largest(mib2, mib2, gib, 0, mib2), PageSize::Size2M);
    assert_eq!(largest(mib2, mib2, gib + 4096, 0, mib2), PageSize::Size4K, "incongruent");
    assert_eq!(largest(MIB, 2 * mib2, gib + MIB, 0, MIB), PageSize::Size4K, "head");
    assert_eq!(largest(MIB, 2 * mib2, gib + MIB, 0, mib2), PageSize::Size2M, "middle");
    assert_eq!(largest(MIB, 2 * mib2, gib + MIB, 0, 2 * mib2), PageSize::Size4K, "tail");
    assert_eq!(largest(gib, gib, 4 * gib, 0, gib), PageSize::Size1G);
    assert_eq!(largest(gib, gib, 4 * gib, KVM_MEM_LOG_DIRTY_PAGES, gib), PageSize::Size4K, "logged");
}
