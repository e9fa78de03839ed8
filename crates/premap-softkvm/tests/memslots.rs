//! Changing slots: what survives it, what does not, and the hazards that it is for a pre-fault.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::*;
use premap_address::{Gpa, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::Vcpu;
use premap_kvm::abi::KVM_MEM_LOG_DIRTY_PAGES;
use premap_softkvm::{GuestFault, Profile};

const GPA: u64 = 1 << 32;
const OTHER: u64 = 2 << 32;

#[test]
fn deleting_a_slot_takes_all_mappings_while_the_quirk_is_on_and_else_its_own() {
    for (quirk, left) in [(true, 0), (false, 8)] {
        let (kept, gone) = (Memory::memfd(8), Memory::memfd(4));
        let vm = vm(Profile::V6_12);
        if !quirk {
            disable_slot_zap_quirk(&vm);
        }
        attach(&vm, 0, 0, GPA, &kept);
        attach(&vm, 1, 0, OTHER, &gone);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 8);
        pre_fault_all(&mut vcpu, OTHER, 4);
        assert_eq!(mapped(&vm), [12, 0, 0]);
        detach(&vm, 1);
        assert_eq!(mapped(&vm), [left, 0, 0], "quirk {quirk}");
        write_each(&mut vcpu, GPA, 8);
        assert_eq!(stat(&vcpu, "pf_taken"), 8 - left);
        assert_eq!(vcpu.read(Gpa::new(OTHER)), Err(GuestFault::Mmio { gpa: Gpa::new(OTHER) }));
    }
}

#[test]
fn a_moved_slot_has_its_content_at_the_new_place_alone() {
    for quirk in [true, false] {
        let memory = Memory::memfd(4);
        let vm = vm(Profile::V7_2);
        if !quirk {
            disable_slot_zap_quirk(&vm);
        }
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        write_each(&mut vcpu, GPA, 4);
        attach(&vm, 0, 0, OTHER, &memory);
        for page in 0..4 {
            assert_eq!(vcpu.read(Gpa::new(OTHER + page * PAGE_SIZE)), Ok(page));
            assert!(vcpu.read(Gpa::new(GPA + page * PAGE_SIZE)).is_err());
        }
        assert_eq!(mapped(&vm), [4, 0, 0]);
    }
}

#[test]
fn turning_dirty_logging_on_splits_and_protects() {
    let Some(memory) = Memory::huge(1024) else { return };
    memory.populate_write(0..1024);
    for (profile, after) in [(Profile::V6_12, [0, 0, 0]), (Profile::V7_2, [0, 2, 0])] {
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 1024);
        if mapped(&vm) != [0, 2, 0] {
            println!("skipped: the kernel gave no huge pages");
            return;
        }
        attach(&vm, 0, KVM_MEM_LOG_DIRTY_PAGES, GPA, &memory);
        assert_eq!(mapped(&vm), [1024, 0, 0], "split at once");
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), []);
        vcpu.write(Gpa::new(GPA + 700 * PAGE_SIZE), 1).unwrap();
        vcpu.read(Gpa::new(GPA + 701 * PAGE_SIZE)).unwrap();
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap(), [700]);
        attach(&vm, 0, 0, GPA, &memory);
        assert_eq!(dirty_log(&vm, 0, 1024).unwrap_err(), Errno::NOENT);
        assert_eq!(mapped(&vm), after, "{profile}: small mappings of huge pages go, or grow back");
        write_each(&mut vcpu, GPA, 1024);
        assert_eq!(mapped(&vm), [0, 2, 0]);
        assert_eq!(vcpu.read(Gpa::new(GPA + 700 * PAGE_SIZE)), Ok(700));
    }
}

#[test]
fn turning_dirty_logging_on_splits_what_cannot_be_written_too() {
    // Never written, so that a read maps the huge zero page, which is protected already.
    let Some(memory) = Memory::huge(1024) else { return };
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 1);
    if mapped(&vm) != [0, 1, 0] {
        println!("skipped: the kernel gave no huge zero page");
        return;
    }
    attach(&vm, 0, KVM_MEM_LOG_DIRTY_PAGES, GPA, &memory);
    assert_eq!(mapped(&vm), [512, 0, 0]);
}

#[test]
fn the_dirty_log_of_no_slot_and_of_no_log() {
    let memory = Memory::anonymous(1);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    assert_eq!(dirty_log(&vm, 0, 1).unwrap_err(), Errno::NOENT);
    assert_eq!(dirty_log(&vm, 9, 1).unwrap_err(), Errno::NOENT);
    assert_eq!(dirty_log(&vm, 0x2_0000, 1).unwrap_err(), Errno::INVAL);
}

#[test]
fn with_a_stale_root_6_12_spins_until_a_signal_and_later_ones_do_not() {
    for profile in Profile::ALL {
        let memory = Memory::memfd(8);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        attach(&vm, 1, 0, OTHER, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        pre_fault_all(&mut vcpu, GPA, 8);
        detach(&vm, 1);
        let answer = signal::interrupted_after(Duration::from_millis(100), || pre_fault(&mut vcpu, GPA, 8));
        if profile == Profile::V6_12 {
            assert_eq!(answer, (Err(Errno::INTR), GPA, 8));
            assert_eq!(mapped(&vm), [0, 0, 0]);
            // Only running the vCPU, or a forced drop of its root, helps; a spare vCPU that never ran is not affected.
            let mut spare = vm.create_vcpu(1).unwrap();
            pre_fault_all(&mut spare, GPA, 4);
            vcpu.renew_root().unwrap();
            pre_fault_all(&mut vcpu, GPA, 8);
        } else {
            assert_eq!(answer, (Ok(()), GPA + 8 * PAGE_SIZE, 0), "{profile}");
        }
        assert_eq!(mapped(&vm), [8, 0, 0]);
    }
}

#[test]
fn a_pre_fault_that_spins_gets_one_page_of_the_host_as_linux_does() {
    for memory in [Memory::anonymous(1024), Memory::memfd(1024)] {
        let vm = vm(Profile::V6_12);
        attach(&vm, 0, 0, GPA, &memory);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(pre_fault(&mut vcpu, OTHER, 1).0, Err(Errno::NOENT), "its root is loaded");
        attach(&vm, 0, 0, OTHER, &memory);
        let spin = || pre_fault(&mut vcpu, OTHER, 1024);
        assert_eq!(
            signal::interrupted_after(Duration::from_millis(100), spin),
            (Err(Errno::INTR), OTHER, 1024)
        );
        assert_eq!(memory.present(), 1);
        vcpu.renew_root().unwrap();
        pre_fault_all(&mut vcpu, OTHER, 1024);
        assert_eq!((memory.present(), mapped(&vm)), (1024, [1024, 0, 0]));
    }
}

#[test]
fn running_the_vcpu_frees_a_stale_root() {
    let memory = Memory::memfd(8);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    attach(&vm, 1, 0, OTHER, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 8);
    detach(&vm, 1);
    vcpu.read(Gpa::new(GPA)).unwrap();
    pre_fault_all(&mut vcpu, GPA, 8);
    assert_eq!(mapped(&vm), [8, 0, 0]);
}

/// A pre-fault in a slot while it is being deleted: the deletion waits for the pre-fault, which in old releases waits for
/// the deletion, until a signal comes.
#[test]
fn a_slot_being_deleted_is_a_spin_or_eagain() {
    for profile in [Profile::V6_12, Profile::V7_2] {
        let memory = Memory::memfd(64);
        let vm = vm(profile);
        attach(&vm, 0, 0, GPA, &memory);
        let (deleting, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let mut vcpu = vm.create_vcpu(0).unwrap();
                loop {
                    // A spare vCPU's root: what is stale is not what this test is about.
                    vcpu.renew_root().unwrap();
                    let (result, _, _) = signal::interrupted_after(Duration::from_millis(200), || {
                        pre_fault(&mut vcpu, GPA, 64)
                    });
                    match result {
                        _ if stop.load(Ordering::SeqCst) => return None,
                        Ok(()) => deleting.store(true, Ordering::SeqCst),
                        // Just deleted, and not there again yet.
                        Err(Errno::NOENT) => {}
                        Err(errno) => return Some(errno),
                    }
                }
            });
            while !deleting.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            // Delete and make again until the pre-fault meets a slot that is about to go.
            let end = Instant::now() + Duration::from_secs(20);
            while !worker.is_finished() && Instant::now() < end {
                detach(&vm, 0);
                attach(&vm, 0, 0, GPA, &memory);
            }
            stop.store(true, Ordering::SeqCst);
            let met = worker.join().unwrap();
            let expected = if profile == Profile::V6_12 { Errno::INTR } else { Errno::AGAIN };
            assert_eq!(met, Some(expected), "{profile}");
        });
        assert_eq!(
            vm.create_vcpu(1).map(|mut vcpu| pre_fault(&mut vcpu, GPA, 64).2),
            Ok(0),
            "all is well after"
        );
    }
}

#[path = "guest/signal.rs"]
mod signal;
