//! Processes that share a VM's memory.
//!
//! A fork makes every private page of the process shared, whichever test it belongs to. So these tests have a process
//! of their own, and take turns in it.

#[path = "../../../conformance/src/child.rs"]
mod child;
#[path = "guest/fork.rs"]
mod fork;
mod guest;

use std::sync::{Mutex, MutexGuard, PoisonError};

use guest::*;
use premap_kvm::Errno;
use premap_softkvm::Profile;

const GPA: u64 = 1 << 32;

static TURN: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn after_a_fork_private_pages_are_copied_before_they_are_written() {
    let _alone = alone();
    let memory = Memory::anonymous(8);
    memory.populate_write(0..8);
    let vm = vm(Profile::V7_2);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    pre_fault_all(&mut vcpu, GPA, 8);
    let child = fork::child();
    vm.notifier().shared(&memory.range(0..8));
    pre_fault_all(&mut vcpu, GPA, 8);
    write_each(&mut vcpu, GPA, 4);
    assert_eq!(stat(&vcpu, "pf_taken"), 2 * 4, "mapped read-only, copied, mapped");
    drop(child);
}

#[test]
fn another_process_gets_eio() {
    let _alone = alone();
    let vm = vm(Profile::V6_12);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert!(child::in_child(|| pre_fault(&mut vcpu, 0, 0).0 == Err(Errno::IO)));
    assert_eq!(pre_fault(&mut vcpu, 0, 0).0, Err(Errno::INVAL));
}
