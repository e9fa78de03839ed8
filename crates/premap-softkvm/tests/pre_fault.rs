//! `KVM_PRE_FAULT_MEMORY`: each row of the 6.12 table that a default VM without nesting can reach.
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

mod guest;

use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::abi::{
    KVM_CAP_PRE_FAULT_MEMORY, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_pre_fault_memory,
};
use premap_kvm::probe::{self, PreFault};
use premap_kvm::{Errno, Vcpu, Vm};
use premap_softkvm::{GuestFault, PhysicalBits, Profile, SoftConfig, SoftVcpu, SoftVm, Tdp};
use rustix::mm::{Advice, MprotectFlags};

const GPA: u64 = 1 << 32;

/// A VM of 6.12 with a slot of `pages` at [`GPA`].
fn machine(pages: u64) -> (Memory, SoftVm, SoftVcpu) {
    let memory = Memory::anonymous(pages);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let vcpu = vm.create_vcpu(0).unwrap();
    (memory, vm, vcpu)
}

#[test]
fn arguments_are_checked_flags_first_and_the_range_stays() {
    let (_memory, _vm, mut vcpu) = machine(4);
    for (gpa, size, flags) in [
        (GPA, PAGE_SIZE, 1),
        (1, 1, 1),
        (GPA + 1, PAGE_SIZE, 0),
        (GPA, PAGE_SIZE + 1, 0),
        (GPA, 0, 0),
        (!0xfff, PAGE_SIZE, 0),
        (!0xfff, 2 * PAGE_SIZE, 0),
    ] {
        let mut range = kvm_pre_fault_memory { gpa, size, flags, padding: [7; 5] };
        assert_eq!(vcpu.pre_fault_memory(&mut range), Err(Errno::INVAL), "{gpa:#x} {size:#x} {flags}");
        assert_eq!((range.gpa, range.size, range.flags), (gpa, size, flags));
    }
    let mut range = kvm_pre_fault_memory { gpa: GPA, size: PAGE_SIZE, flags: 0, padding: [7; 5] };
    assert_eq!(vcpu.pre_fault_memory(&mut range), Ok(()), "padding is not looked at");
    assert_eq!((range.gpa, range.size, range.padding), (GPA + PAGE_SIZE, 0, [7; 5]));
}

#[test]
fn progress_swallows_the_error_and_the_next_call_tells_it() {
    let (_memory, vm, mut vcpu) = machine(5);
    assert_eq!(pre_fault(&mut vcpu, GPA + 3 * PAGE_SIZE, 4), (Ok(()), GPA + 5 * PAGE_SIZE, 2));
    assert_eq!(pre_fault(&mut vcpu, GPA + 5 * PAGE_SIZE, 2), (Err(Errno::NOENT), GPA + 5 * PAGE_SIZE, 2));
    assert_eq!(mapped(&vm), [2, 0, 0]);
    assert_eq!(stat(&vcpu, "pf_taken"), 0);
}

#[test]
fn the_kernels_own_test_gets_the_kernels_answers() {
    let memory = Memory::anonymous(513);
    let vm = vm(Profile::V6_12);
    let gpa = (1 << 47) - 514 * PAGE_SIZE;
    attach(&vm, 0, 0, gpa, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(pre_fault(&mut vcpu, gpa, 512).2, 0);
    assert_eq!(pre_fault(&mut vcpu, gpa + HUGE, 2).2, 1);
    assert_eq!(pre_fault(&mut vcpu, gpa + HUGE + PAGE_SIZE, 1).0, Err(Errno::NOENT));
    for page in 0..513 {
        assert_eq!(vcpu.read(Gpa::new(gpa + page * PAGE_SIZE)), Ok(0));
    }
    assert_eq!(stat(&vcpu, "pf_taken"), 0);
}

#[test]
fn no_slot_is_enoent_and_leaves_an_mmio_mapping() {
    let (_memory, _vm, mut vcpu) = machine(1);
    assert_eq!(pre_fault(&mut vcpu, 0, 1).0, Err(Errno::NOENT));
    assert_eq!(stat(&vcpu, "pf_mmio_spte_created"), 1);
    assert_eq!(vcpu.read(Gpa::new(8)), Err(GuestFault::Mmio { gpa: Gpa::new(8) }));
    assert_eq!((stat(&vcpu, "pf_taken"), stat(&vcpu, "exits")), (0, 1), "the mapping tells, no fault");
    assert_eq!(vcpu.read(Gpa::new(PAGE_SIZE)), Err(GuestFault::Mmio { gpa: Gpa::new(PAGE_SIZE) }));
    assert_eq!((stat(&vcpu, "pf_taken"), stat(&vcpu, "pf_mmio_spte_created")), (1, 2));
}

#[test]
fn an_mmio_mapping_is_not_believed_after_the_slots_changed() {
    let (memory, vm, mut vcpu) = machine(2);
    assert_eq!(pre_fault(&mut vcpu, 0, 1).0, Err(Errno::NOENT));
    set(&vm, &region(1, 0, 0, memory.hva(), 1)).unwrap();
    assert_eq!(vcpu.read(Gpa::new(0)), Ok(0));
}

#[test]
fn beyond_the_processors_addresses_nothing_is_installed() {
    let physical_bits = PhysicalBits::new(40).unwrap();
    let vm = SoftVm::new(SoftConfig { physical_bits, ..SoftConfig::default() }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(pre_fault(&mut vcpu, 1 << 40, 1).0, Err(Errno::NOENT));
    assert_eq!(pre_fault(&mut vcpu, 1 << 62, 1).0, Err(Errno::NOENT));
    assert_eq!(stat(&vcpu, "pf_mmio_spte_created"), 0);
    assert_eq!(pre_fault(&mut vcpu, (1 << 40) - PAGE_SIZE, 1).0, Err(Errno::NOENT));
    assert_eq!(stat(&vcpu, "pf_mmio_spte_created"), 1);
}

#[test]
fn host_memory_that_is_not_there_is_efault() {
    let (memory, vm, mut vcpu) = machine(6);
    memory.unmap(2..3);
    memory.protect(4..5, MprotectFlags::empty());
    let at = |page| GPA + page * PAGE_SIZE;
    assert_eq!(pre_fault(&mut vcpu, GPA, 6), (Ok(()), at(2), 4));
    assert_eq!(pre_fault(&mut vcpu, at(2), 4), (Err(Errno::FAULT), at(2), 4));
    assert_eq!(pre_fault(&mut vcpu, at(3), 3), (Ok(()), at(4), 2));
    assert_eq!(pre_fault(&mut vcpu, at(4), 2), (Err(Errno::FAULT), at(4), 2));
    let failed = |page| Err(GuestFault::Failed { gpa: Gpa::new(at(page)), errno: Errno::FAULT });
    assert_eq!(vcpu.read(Gpa::new(at(2))), failed(2));
    assert_eq!(vcpu.read(Gpa::new(at(4))), failed(4));
    assert_eq!(mapped(&vm), [3, 0, 0]);
}

#[test]
fn protected_pages_that_are_present_are_efault_too() {
    let (memory, _vm, mut vcpu) = machine(4);
    memory.populate_write(0..4);
    memory.protect(1..3, MprotectFlags::empty());
    assert_eq!(pre_fault(&mut vcpu, GPA, 4), (Ok(()), GPA + PAGE_SIZE, 3));
    assert_eq!(pre_fault(&mut vcpu, GPA + PAGE_SIZE, 3).0, Err(Errno::FAULT));
}

#[test]
fn beyond_the_end_of_the_file_is_efault_and_not_a_signal() {
    let memory = Memory::memfd(8);
    rustix::fs::ftruncate(memory.file.as_ref().unwrap(), 3 * PAGE_SIZE).unwrap();
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(pre_fault(&mut vcpu, GPA, 8), (Ok(()), GPA + 3 * PAGE_SIZE, 5));
    assert_eq!(pre_fault(&mut vcpu, GPA + 3 * PAGE_SIZE, 5).0, Err(Errno::FAULT));
    assert!(vcpu.write(Gpa::new(GPA + 3 * PAGE_SIZE), 1).is_err());
}

#[test]
fn a_read_only_slot_is_mapped_read_only() {
    let memory = Memory::anonymous(4);
    memory.populate_write(0..4);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, KVM_MEM_READONLY, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 4);
    read_each(&mut vcpu, GPA, 4);
    assert_eq!(stat(&vcpu, "pf_taken"), 0);
    assert_eq!(vcpu.write(Gpa::new(GPA), 1), Err(GuestFault::ReadOnly { gpa: Gpa::new(GPA) }));
    assert_eq!((stat(&vcpu, "pf_taken"), stat(&vcpu, "pf_emulate")), (1, 1));
}

#[test]
fn dirty_logging_forces_small_pages_and_sets_the_bits_of_writable_ones() {
    for profile in [Profile::V6_12, Profile::V7_2] {
        let memory = Memory::anonymous(1024);
        memory.populate_write(0..600);
        let vm = vm(profile);
        attach(&vm, 0, KVM_MEM_LOG_DIRTY_PAGES, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 700);
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), (0..600).collect::<Vec<_>>());
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), []);
        assert_eq!(mapped(&vm), [700, 0, 0]);
        vcpu.write(Gpa::new(GPA + 5 * PAGE_SIZE), 1).unwrap();
        assert_eq!((stat(&vcpu, "pf_taken"), stat(&vcpu, "pf_fast")), (1, 1), "{profile}: protected again");
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), [5]);
        pre_fault_all(&mut vcpu, GPA, 8);
        let again = if profile == Profile::V6_12 { (0..8).collect() } else { vec![] };
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), again, "{profile}: rebuilt, or left alone");
        pre_fault_all(&mut vcpu, GPA, 8);
        write_each(&mut vcpu, GPA, 8);
        let faults = if profile == Profile::V6_12 { 0 } else { 8 };
        assert_eq!(stat(&vcpu, "pf_taken"), 1 + faults, "{profile}: writable, or protected still");
    }
}

#[test]
fn a_vcpu_that_never_ran_can_pre_fault_for_another() {
    let (memory, vm, mut runs) = machine(64);
    memory.populate_write(0..64);
    let mut spare = vm.create_vcpu(7).unwrap();
    pre_fault_all(&mut spare, GPA, 64);
    write_each(&mut runs, GPA, 64);
    assert_eq!((stat(&runs, "pf_taken"), stat(&runs, "exits")), (0, 0));
}

#[test]
fn a_huge_page_covers_more_than_was_asked() {
    let Some(memory) = Memory::huge(1024) else { return };
    memory.populate_write(0..1024);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(pre_fault(&mut vcpu, GPA + 7 * PAGE_SIZE, 3), (Ok(()), GPA + 10 * PAGE_SIZE, 0));
    if mapped(&vm) == [3, 0, 0] {
        println!("skipped: the kernel gave no huge page");
        return;
    }
    assert_eq!(mapped(&vm), [0, 1, 0]);
    assert_eq!(pre_fault(&mut vcpu, GPA + 511 * PAGE_SIZE, 2).2, 0);
    assert_eq!(mapped(&vm), [0, 2, 0]);
    write_each(&mut vcpu, GPA, 1024);
    assert_eq!(stat(&vcpu, "pf_taken"), 0);
}

#[test]
fn a_slot_that_does_not_allow_huge_pages_gets_small_ones() {
    let Some(memory) = Memory::huge(1024) else { return };
    memory.populate_write(0..1024);
    let vm = vm(Profile::V6_12);
    set(&vm, &region(0, 0, GPA + PAGE_SIZE, memory.hva(), 1023)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA + PAGE_SIZE, 1023);
    assert_eq!(mapped(&vm), [1023, 0, 0]);
}

#[test]
fn a_page_that_the_host_replaced_without_a_word_is_mapped_anew() {
    for profile in Profile::ALL {
        let memory = Memory::anonymous(8);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 8);
        memory.populate_write(0..8);
        pre_fault_all(&mut vcpu, GPA, 8);
        write_each(&mut vcpu, GPA, 8);
        assert_eq!(stat(&vcpu, "pf_taken"), 0, "{profile}: the zero page was mapped, and is no more");
    }
}

#[test]
fn without_tdp_the_capability_is_0_and_the_ioctl_is_eopnotsupp() {
    let memory = Memory::anonymous(1);
    let vm = SoftVm::new(SoftConfig { tdp: Tdp::Off, ..SoftConfig::default() }).unwrap();
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY), Ok(0));
    assert_eq!(pre_fault(&mut vcpu, GPA, 1), (Err(Errno::OPNOTSUPP), GPA, 1));
    assert_eq!(probe::pre_fault(&vm, &mut vcpu), PreFault::ShadowPaging);
    assert_eq!(vcpu.write(Gpa::new(GPA), 5), Ok(()), "guests run all the same");

    let (_memory, vm, mut vcpu) = machine(1);
    assert_eq!(probe::pre_fault(&vm, &mut vcpu), PreFault::Supported);
    assert_eq!(mapped(&vm), [0, 0, 0]);
}

#[test]
fn a_dead_vm_gives_eio_to_everything_first() {
    let (_memory, vm, mut vcpu) = machine(1);
    vm.kill();
    let mut range = kvm_pre_fault_memory { gpa: 1, size: 1, flags: 1, ..Default::default() };
    assert_eq!(vcpu.pre_fault_memory(&mut range), Err(Errno::IO));
    assert_eq!(vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY), Err(Errno::IO));
    assert!(matches!(vcpu.read(Gpa::new(GPA)), Err(GuestFault::Failed { errno: Errno::IO, .. })));
    assert_eq!(vm.create_vcpu(1).unwrap_err(), Errno::IO);
}

#[test]
fn what_the_guest_reads_is_what_lies_in_the_memory() {
    let (memory, _vm, mut vcpu) = machine(16);
    for page in 0..16 {
        vcpu.write(Gpa::new(GPA + page * PAGE_SIZE + 8), page * 3).unwrap();
    }
    memory.advise(4..8, Advice::LinuxPopulateRead);
    for page in 0..16 {
        assert_eq!(vcpu.read(Gpa::new(GPA + page * PAGE_SIZE + 8)), Ok(page * 3));
        assert_eq!(memory.word(page, 1), page * 3);
    }
    assert_eq!(vcpu.read(Gpa::new(GPA + 4)), Err(GuestFault::Unaligned { gpa: Gpa::new(GPA + 4) }));
}
