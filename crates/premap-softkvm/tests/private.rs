//! Private memory: guest_memfd, attributes and conversions, and the faults that go back to the VMM.

#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use guest::*;
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2,
};
use premap_kvm::{Errno, Vm};
use premap_softkvm::{GuestFault, GuestMemfd, MemoryFault, Profile, SoftConfig, SoftVcpu, SoftVm, VmType};
use rustix::fs::FallocateFlags;

const GPA: u64 = 1 << 32;
const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;
const PUNCH: FallocateFlags = FallocateFlags::KEEP_SIZE.union(FallocateFlags::PUNCH_HOLE);

fn protected(profile: Profile) -> SoftVm {
    let vm_type = VmType::SoftwareProtected;
    SoftVm::new(SoftConfig { profile, vm_type, ..SoftConfig::default() }).unwrap()
}

fn create(vm: &SoftVm, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
    vm.create_guest_memfd(&kvm_create_guest_memfd { size, flags, ..Default::default() })
}

fn memfd(vm: &SoftVm, pages: u64) -> GuestMemfd {
    create(vm, pages * PAGE_SIZE, 0).unwrap()
}

fn with_memfd(
    slot: u32,
    gpa: u64,
    memory: &Memory,
    file: &GuestMemfd,
    first: u64,
) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: gpa,
        memory_size: memory.pages() * PAGE_SIZE,
        userspace_addr: memory.hva().raw(),
        guest_memfd_offset: first * PAGE_SIZE,
        guest_memfd: file.number(),
        ..Default::default()
    }
}

fn attributes(vm: &SoftVm, gpa: u64, pages: u64, attributes: u64) -> Result<(), Errno> {
    let size = pages * PAGE_SIZE;
    vm.set_memory_attributes(&kvm_memory_attributes { address: gpa, size, attributes, flags: 0 })
}

fn at(page: u64) -> Gpa {
    Gpa::new(GPA + page * PAGE_SIZE)
}

fn fault(page: u64, private: bool) -> Option<MemoryFault> {
    Some(MemoryFault { range: GpaRange::new(at(page), PAGE_SIZE), private })
}

/// A VM of each profile with a slot of so many pages, shared and private, at [`GPA`].
fn each(pages: u64, test: impl Fn(&SoftVm, &mut SoftVcpu, &Memory, GuestMemfd)) {
    for profile in Profile::ALL {
        let memory = Memory::anonymous(pages);
        let vm = protected(profile);
        let file = memfd(&vm, pages);
        set2(&vm, &with_memfd(0, GPA, &memory, &file, 0)).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        test(&vm, &mut vcpu, &memory, file);
        drop((vcpu, vm));
    }
}

#[test]
fn a_page_keeps_what_was_written_while_it_was_shared_and_while_it_was_private() {
    each(8, |vm, vcpu, memory, _file| {
        for page in 0..8 {
            vcpu.write(at(page), 100 + page).unwrap();
        }
        attributes(vm, GPA + 2 * PAGE_SIZE, 3, PRIVATE).unwrap();
        assert_eq!(mapped(vm), [5, 0, 0], "a conversion unmaps, and only what it converts");
        for page in 2..5 {
            assert_eq!(vcpu.read(at(page)), Ok(0), "private memory starts empty");
            vcpu.write(at(page), 200 + page).unwrap();
            assert_eq!(memory.word(page, 0), 100 + page, "the VMM does not see it");
        }
        attributes(vm, GPA, 8, 0).unwrap();
        for page in 0..8 {
            assert_eq!(vcpu.read(at(page)), Ok(100 + page));
        }
        attributes(vm, GPA, 8, PRIVATE).unwrap();
        for page in 0..8 {
            assert_eq!(vcpu.read(at(page)), Ok(if (2..5).contains(&page) { 200 + page } else { 0 }));
        }
    });
}

#[test]
fn private_memory_is_pre_faulted_writable_and_by_small_pages() {
    each(1024, |vm, vcpu, _memory, _file| {
        attributes(vm, GPA, 1024, PRIVATE).unwrap();
        pre_fault_all(vcpu, GPA, 1024);
        assert_eq!(mapped(vm), [1024, 0, 0]);
        write_each(vcpu, GPA, 1024);
        assert_eq!(stat(vcpu, "pf_taken"), 0, "not the zero page, so no second fault");
    });
}

#[test]
fn a_range_of_both_kinds_is_pre_faulted_in_one_call() {
    each(64, |vm, vcpu, memory, _file| {
        memory.populate_write(0..64);
        attributes(vm, GPA + 20 * PAGE_SIZE, 10, PRIVATE).unwrap();
        assert_eq!(pre_fault(vcpu, GPA, 64), (Ok(()), GPA + 64 * PAGE_SIZE, 0));
        write_each(vcpu, GPA, 64);
        assert_eq!(stat(vcpu, "pf_taken"), 0);
        assert_eq!((memory.word(19, 0), memory.word(20, 0)), (19, 0));
    });
}

#[test]
fn what_is_not_there_as_it_is_wanted_goes_back_to_the_vmm() {
    let memory = Memory::anonymous(4);
    let vm = protected(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    attributes(&vm, GPA + PAGE_SIZE, 100, PRIVATE).unwrap();
    // A slot without private memory: what is before it is done, and the next call says why it goes no further.
    assert_eq!(pre_fault(&mut vcpu, GPA, 4), (Ok(()), GPA + PAGE_SIZE, 3));
    assert_eq!(pre_fault(&mut vcpu, GPA + PAGE_SIZE, 3), (Err(Errno::FAULT), GPA + PAGE_SIZE, 3));
    assert_eq!(vcpu.memory_fault(), fault(1, true));
    vcpu.write(at(0), 1).unwrap();
    assert_eq!(vcpu.memory_fault(), None);
    assert_eq!(vcpu.read(at(2)), Err(GuestFault::Failed { gpa: at(2), errno: Errno::FAULT }));
    assert_eq!(vcpu.memory_fault(), fault(2, true));
    // No slot at all.
    assert_eq!(pre_fault(&mut vcpu, GPA + 50 * PAGE_SIZE, 1).0, Err(Errno::FAULT));
    assert_eq!(vcpu.memory_fault(), fault(50, true));
    assert_eq!(stat(&vcpu, "pf_mmio_spte_created"), 0);
    assert_eq!(pre_fault(&mut vcpu, GPA + 500 * PAGE_SIZE, 1).0, Err(Errno::NOENT));
}

#[test]
fn a_private_page_is_missed_before_its_slot_is_found_to_be_read_only() {
    let memory = Memory::anonymous(4);
    let vm = protected(Profile::V6_12);
    set(&vm, &region(0, KVM_MEM_READONLY, GPA, memory.hva(), 4)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    attributes(&vm, GPA, 1, PRIVATE).unwrap();
    assert_eq!(vcpu.write(at(0), 1), Err(GuestFault::Failed { gpa: at(0), errno: Errno::FAULT }));
    assert_eq!(vcpu.memory_fault(), fault(0, true));
    assert_eq!(vcpu.write(at(1), 1), Err(GuestFault::ReadOnly { gpa: at(1) }));
}

#[test]
fn an_address_without_memory_is_remembered_as_such_when_it_becomes_private() {
    let vm = protected(Profile::V6_12);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(vcpu.read(at(0)), Err(GuestFault::Mmio { gpa: at(0) }));
    attributes(&vm, GPA, 2, PRIVATE).unwrap();
    assert_eq!(vcpu.read(at(0)), Err(GuestFault::Mmio { gpa: at(0) }), "no slot, so no mapping went");
    assert_eq!(vcpu.read(at(1)), Err(GuestFault::Failed { gpa: at(1), errno: Errno::FAULT }));
}

#[test]
fn a_hole_takes_private_pages_away_and_they_come_back_empty() {
    each(16, |vm, vcpu, _memory, file| {
        attributes(vm, GPA, 16, PRIVATE).unwrap();
        write_each(vcpu, GPA, 16);
        file.fallocate(PUNCH, 4 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
        assert_eq!(mapped(vm), [12, 0, 0]);
        for page in 0..16 {
            assert_eq!(vcpu.read(at(page)), Ok(if (4..8).contains(&page) { 0 } else { page }));
        }
        file.fallocate(PUNCH, 64 * PAGE_SIZE, PAGE_SIZE).unwrap();
        file.fallocate(FallocateFlags::KEEP_SIZE, 0, 16 * PAGE_SIZE).unwrap();
        assert_eq!(vcpu.read(at(3)), Ok(3), "making memory present changes nothing");
    });
}

#[test]
fn a_closed_descriptor_takes_its_memory_along() {
    each(4, |vm, vcpu, _memory, file| {
        attributes(vm, GPA, 2, PRIVATE).unwrap();
        write_each(vcpu, GPA, 4);
        let number = file.number();
        drop(file);
        assert_eq!(mapped(vm), [0, 0, 0], "shared pages of the slot go too, and come back by themselves");
        assert_eq!(vcpu.read(at(0)), Err(GuestFault::Failed { gpa: at(0), errno: Errno::FAULT }));
        assert_eq!(vcpu.memory_fault(), fault(0, true));
        assert_eq!(vcpu.read(at(3)), Ok(3));
        let other = Memory::anonymous(1);
        let file = memfd(vm, 1);
        let region = with_memfd(7, 0, &other, &file, 0);
        assert_eq!(
            set2(vm, &kvm_userspace_memory_region2 { guest_memfd: 1 << 20, ..region }),
            Err(Errno::BADF)
        );
        assert!(
            number == file.number()
                || set2(vm, &kvm_userspace_memory_region2 { guest_memfd: number, ..region }).is_err()
        );
    });
}

#[test]
fn each_request_for_private_memory_has_the_kernel_s_errno() {
    let vm = protected(Profile::V6_12);
    for (size, flags) in [(0, 0), (PAGE_SIZE + 1, 0), (PAGE_SIZE, 1), (u64::MAX - 4095, 0)] {
        assert_eq!(create(&vm, size, flags).err(), Some(Errno::INVAL), "{size:#x} {flags}");
    }
    let file = memfd(&vm, 8);
    for (mode, offset, bytes, errno) in [
        (FallocateFlags::empty(), 0, PAGE_SIZE, Errno::OPNOTSUPP),
        (FallocateFlags::PUNCH_HOLE, 0, PAGE_SIZE, Errno::OPNOTSUPP),
        (FallocateFlags::KEEP_SIZE | FallocateFlags::ZERO_RANGE, 0, PAGE_SIZE, Errno::OPNOTSUPP),
        (FallocateFlags::KEEP_SIZE, 0, 0, Errno::INVAL),
        (FallocateFlags::KEEP_SIZE, 1, PAGE_SIZE, Errno::INVAL),
        (PUNCH, 0, PAGE_SIZE - 1, Errno::INVAL),
        (FallocateFlags::KEEP_SIZE, 0, 9 * PAGE_SIZE, Errno::INVAL),
        (PUNCH, 1 << 63, PAGE_SIZE, Errno::INVAL),
        (PUNCH, PAGE_SIZE, (1 << 63) - PAGE_SIZE, Errno::FBIG),
        (FallocateFlags::empty(), PAGE_SIZE, (1 << 63) - PAGE_SIZE, Errno::FBIG),
        (FallocateFlags::PUNCH_HOLE, PAGE_SIZE, (1 << 63) - PAGE_SIZE, Errno::OPNOTSUPP),
    ] {
        assert_eq!(file.fallocate(mode, offset, bytes), Err(errno), "{mode:?} {offset} {bytes}");
    }

    let memory = Memory::anonymous(4);
    let good = with_memfd(0, GPA, &memory, &file, 2);
    let other_vm = protected(Profile::V6_12);
    let other = memfd(&other_vm, 8);
    let flags = |more| KVM_MEM_GUEST_MEMFD | more;
    for (what, bad, errno) in [
        (
            "logged",
            kvm_userspace_memory_region2 { flags: flags(KVM_MEM_LOG_DIRTY_PAGES), ..good },
            Errno::INVAL,
        ),
        ("read-only", kvm_userspace_memory_region2 { flags: flags(KVM_MEM_READONLY), ..good }, Errno::INVAL),
        (
            "past its end",
            kvm_userspace_memory_region2 { guest_memfd_offset: 5 * PAGE_SIZE, ..good },
            Errno::INVAL,
        ),
        ("unaligned", kvm_userspace_memory_region2 { guest_memfd_offset: 1, ..good }, Errno::INVAL),
        ("wraps", kvm_userspace_memory_region2 { guest_memfd_offset: u64::MAX - 4095, ..good }, Errno::INVAL),
        ("another VM's", kvm_userspace_memory_region2 { guest_memfd: other.number(), ..good }, Errno::INVAL),
        ("a terminal's", kvm_userspace_memory_region2 { guest_memfd: 0, ..good }, Errno::INVAL),
    ] {
        assert_eq!(set2(&vm, &bad), Err(errno), "{what}");
    }
    set2(&vm, &good).unwrap();
    assert_eq!(set2(&vm, &good), Err(Errno::INVAL), "it can't be changed, even to what it is");
    assert_eq!(set2(&vm, &kvm_userspace_memory_region2 { flags: 0, ..good }), Err(Errno::INVAL));
    let second = Memory::anonymous(4);
    let overlapping = with_memfd(1, 0, &second, &file, 4);
    assert_eq!(set2(&vm, &overlapping), Err(Errno::INVAL), "page 4 and 5 are slot 0's");
    set2(&vm, &kvm_userspace_memory_region2 { memory_size: 0, ..good }).unwrap();
    set2(&vm, &overlapping).unwrap();

    for (address, size, wanted, flags) in [
        (GPA, 0, PRIVATE, 0),
        (GPA + 1, PAGE_SIZE, PRIVATE, 0),
        (GPA, PAGE_SIZE - 1, PRIVATE, 0),
        (u64::MAX - 4095, 2 * PAGE_SIZE, PRIVATE, 0),
        (GPA, PAGE_SIZE, 1, 0),
        (GPA, PAGE_SIZE, PRIVATE, 1),
    ] {
        let request = kvm_memory_attributes { address, size, attributes: wanted, flags };
        assert_eq!(vm.set_memory_attributes(&request), Err(Errno::INVAL), "{request:?}");
    }
}

#[test]
fn a_default_vm_has_no_private_memory() {
    let vm = vm(Profile::V6_12);
    let memory = Memory::anonymous(4);
    let file = memfd(&vm, 4);
    assert_eq!(set2(&vm, &with_memfd(0, GPA, &memory, &file, 0)), Err(Errno::INVAL));
    assert_eq!(set(&vm, &region(0, KVM_MEM_GUEST_MEMFD, GPA, memory.hva(), 4)), Err(Errno::INVAL));
    assert_eq!(attributes(&vm, GPA, 4, PRIVATE), Err(Errno::INVAL));
    assert_eq!(attributes(&vm, GPA, 4, 0), Ok(()));
    for (capability, default, protected_vm) in [(233, 0, 8), (234, 0, 1), (235, 3, 3)] {
        assert_eq!(vm.check_extension(capability), Ok(default));
        assert_eq!(protected(Profile::V6_12).check_extension(capability), Ok(protected_vm));
    }
}

#[test]
fn a_huge_page_is_not_mapped_across_pages_of_both_kinds() {
    let Some(memory) = Memory::huge(1024) else { return };
    memory.populate_write(0..1024);
    let vm = protected(Profile::V7_2);
    let file = memfd(&vm, 1024);
    set2(&vm, &with_memfd(0, GPA, &memory, &file, 0)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.write(at(0), 1).unwrap();
    vcpu.write(at(512), 1).unwrap();
    if mapped(&vm) != [0, 2, 0] {
        println!("skipped: the host gave no huge pages");
        return;
    }
    attributes(&vm, GPA + 511 * PAGE_SIZE, 1, PRIVATE).unwrap();
    assert_eq!(mapped(&vm), [0, 1, 0]);
    pre_fault_all(&mut vcpu, GPA, 1024);
    assert_eq!(mapped(&vm), [512, 1, 0]);
    attributes(&vm, GPA, 512, 0).unwrap();
    vcpu.read(at(3)).unwrap();
    assert_eq!(mapped(&vm), [0, 2, 0]);
}

/// A page is converted to and fro while a guest writes it: what it writes lands in one of the two memories, never in
/// memory that was taken away.
#[test]
fn conversions_and_holes_meet_a_running_guest() {
    each(32, |vm, _vcpu, memory, file| {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for id in 1..3 {
                let (vm, stop) = (&vm, &stop);
                scope.spawn(move || {
                    let mut vcpu = vm.create_vcpu(id).unwrap();
                    while !stop.load(Ordering::SeqCst) {
                        for page in 0..32 {
                            vcpu.write(at(page), 7).unwrap();
                        }
                        if id == 1 {
                            pre_fault_all(&mut vcpu, GPA, 32);
                        }
                    }
                });
            }
            for round in 0..200 {
                let kind = if round % 2 == 0 { PRIVATE } else { 0 };
                attributes(vm, GPA + (round % 7) * PAGE_SIZE, 1 + round % 20, kind).unwrap();
                file.fallocate(PUNCH, (round % 16) * PAGE_SIZE, 8 * PAGE_SIZE).unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        attributes(vm, GPA, 32, 0).unwrap();
        let mut vcpu = vm.create_vcpu(3).unwrap();
        for page in 0..32 {
            assert_eq!(vcpu.read(at(page)), Ok(memory.word(page, 0)));
        }
    });
}
