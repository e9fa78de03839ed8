//! Changes of host memory under a VM's feet.

mod guest;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::Errno;
use premap_softkvm::{GuestFault, Profile};
use rustix::mm::{Advice, MprotectFlags};

const GPA: u64 = 1 << 32;

#[test]
fn discarded_memory_is_unmapped_and_comes_back_empty() {
    for profile in Profile::ALL {
        let memory = Memory::anonymous(64);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        write_each(&mut vcpu, GPA, 64);
        let gone = memory.range(10..20);
        vm.notifier().invalidate(&gone, || {
            assert_eq!(mapped(&vm), [54, 0, 0]);
            memory.advise(10..20, Advice::LinuxDontNeed);
        });
        for page in 0..64 {
            let expected = if (10..20).contains(&page) { 0 } else { page };
            assert_eq!(vcpu.read(Gpa::new(GPA + page * PAGE_SIZE)), Ok(expected));
        }
        assert_eq!(stat(&vcpu, "pf_taken"), 64 + 10);
    }
}

#[test]
fn a_part_of_a_huge_mapping_takes_all_of_it() {
    let Some(memory) = Memory::huge(1024) else { return };
    memory.populate_write(0..1024);
    let vm = vm(Profile::V7_2);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 1024);
    if mapped(&vm) != [0, 2, 0] {
        println!("skipped: the kernel gave no huge pages");
        return;
    }
    vm.notifier().invalidate(&memory.range(3..4), || memory.advise(3..4, Advice::LinuxDontNeed));
    assert_eq!(mapped(&vm), [0, 1, 0]);
    pre_fault_all(&mut vcpu, GPA, 1024);
    assert_eq!(mapped(&vm), [512, 1, 0], "the host split its page");
}

#[test]
fn memory_that_lies_behind_two_slots_goes_from_both() {
    let memory = Memory::memfd(8);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    attach(&vm, 1, 0, 2 * GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 8);
    pre_fault_all(&mut vcpu, 2 * GPA, 8);
    assert_eq!(mapped(&vm), [16, 0, 0]);
    drop(vm.notifier().begin(&memory.range(2..4)));
    assert_eq!(mapped(&vm), [12, 0, 0]);
}

#[test]
fn nothing_is_mapped_while_an_invalidation_is_under_way() {
    let memory = Memory::memfd(8);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let under_way = vm.notifier().begin(&memory.range(0..4));
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA + 4 * PAGE_SIZE, 4);
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            pre_fault_all(&mut vcpu, GPA, 4);
            assert!(ended.load(Ordering::SeqCst), "mapped while the host was changing");
        });
        thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(mapped(&vm), [4, 0, 0]);
        ended.store(true, Ordering::SeqCst);
        drop(under_way);
    });
    assert_eq!(mapped(&vm), [8, 0, 0]);
}

/// Guests write and pre-fault while the memory is made inaccessible and accessible again: without the notifier's word, or
/// with a mapping that outlives it, this test dies of SIGSEGV.
#[test]
fn inaccessible_memory_is_never_touched() {
    const PAGES: u64 = 64;
    let memory = Memory::anonymous(PAGES);
    memory.populate_write(0..PAGES);
    let vm = vm(Profile::V7_2);
    attach(&vm, 0, 0, GPA, &memory);
    let (stop, touches) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for id in 0..2 {
            let (vm, stop, touches) = (&vm, &stop, &touches);
            scope.spawn(move || {
                let mut vcpu = vm.create_vcpu(id).unwrap();
                // Who meets the memory while it can't be accessed gets EFAULT, as on Linux.
                while !stop.load(Ordering::SeqCst) {
                    if id == 1 {
                        let (result, _, _) = pre_fault(&mut vcpu, GPA, PAGES);
                        assert!(matches!(result, Ok(()) | Err(Errno::FAULT)), "{result:?}");
                    }
                    for page in 0..PAGES {
                        match vcpu.write(Gpa::new(GPA + page * PAGE_SIZE), page) {
                            Ok(()) => _ = touches.fetch_add(1, Ordering::SeqCst),
                            Err(fault) => assert!(
                                matches!(fault, GuestFault::Failed { errno: Errno::FAULT, .. }),
                                "{fault}"
                            ),
                        }
                    }
                }
            });
        }
        let mut rounds = 0_u64;
        while rounds < 300 || touches.load(Ordering::SeqCst) < 10 * PAGES {
            let part = rounds % PAGES..(rounds % PAGES + 8).min(PAGES);
            vm.notifier().invalidate(&memory.range(part.clone()), || {
                memory.protect(part.clone(), MprotectFlags::empty());
                thread::yield_now();
                memory.protect(part, MprotectFlags::READ | MprotectFlags::WRITE);
            });
            rounds += 1;
        }
        stop.store(true, Ordering::SeqCst);
    });
    let mut vcpu = vm.create_vcpu(2).unwrap();
    write_each(&mut vcpu, GPA, PAGES);
    assert_eq!(mapped(&vm), [PAGES, 0, 0]);
}

#[test]
fn an_observed_copy_unmaps_what_it_replaced_and_nothing_else() {
    for profile in Profile::ALL {
        let memory = Memory::anonymous(16);
        memory.populate_write(0..4);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 16);
        vm.notifier().observe(&memory.range(2..12), || memory.populate_write(2..12));
        assert_eq!(mapped(&vm), [16 - 8, 0, 0], "eight zero pages were replaced");
        write_each(&mut vcpu, GPA, 12);
        assert_eq!(
            stat(&vcpu, "pf_taken"),
            8,
            "{profile}: one fault for each, since the host's page is there"
        );
    }
}
