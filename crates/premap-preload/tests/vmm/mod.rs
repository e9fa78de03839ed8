//! A small VMM, which knows nothing of the library that is preloaded into it.
// UNSAFETY: fork, seccomp filters and ioctls that must fail.
#![expect(unsafe_code, reason = "what a VMM does, and std does not offer")]

mod confine;
mod machine;

use std::io;
use std::os::fd::AsRawFd;

use confine::On;
use kvm_ioctls::Kvm;
use machine::{Kick, Machine};

pub(crate) use machine::BYTES;

/// The environment variable that says what to do.
pub(crate) const VARIABLE: &str = "PREMAP_TEST_VMM";
/// What it prints when it has done all.
pub(crate) const DONE: &str = "the VMM is done";
/// Enough to be at it for a while.
pub(crate) const MUCH: u64 = 256 << 20;

/// Enough to be at it for long.
pub(crate) const VERY_MUCH: u64 = 1 << 30;

const CREATE_VM: libc::c_ulong = 0xae01;
const CREATE_VCPU: libc::c_ulong = 0xae41;
const SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const RUN: libc::c_ulong = 0xae80;

#[test]
#[ignore = "the VMM that the other tests run"]
fn vmm() {
    let kvm = Kvm::new().unwrap();
    match std::env::var(VARIABLE).unwrap().as_str() {
        "plain" => run(&mut Machine::new(&kvm)),
        "close" => (0..3).for_each(|_| run(&mut Machine::new(&kvm))),
        "slots" => slots(&kvm),
        "churn" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, MUCH);
            machine.run_beside_changes(100);
        }
        "pool" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(4 << 30, BYTES);
            machine.add_slot(8 << 30, MUCH);
            machine.hand_over(&[(0, BYTES), (4 << 30, BYTES)]);
            run(&mut machine);
            println!("present: {}", machine::present());
        }
        "pool-untold" => {
            let mut machine = Machine::new(&kvm);
            machine.add_slot(1 << 30, BYTES);
            machine.add_slot(8 << 30, MUCH);
            run(&mut machine);
            println!("present: {}", machine::present());
        }
        "called-back" => called_back(&kvm),
        "fork" => fork(&kvm),
        "errno" => errno(&kvm),
        // The filter is laid before the library was ever called: opening the device asks KVM nothing. And after.
        "confined-before" => {
            confine::loosely(On::EveryThread);
            run(&mut Machine::new(&kvm));
        }
        "confined-after" => {
            let mut machine = Machine::new(&kvm);
            confine::loosely(On::EveryThread);
            run(&mut machine);
        }
        "strict" => {
            let mut machine = Machine::new(&kvm);
            // A vCPU's thread confines itself, as VMMs have it.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    confine::strictly(On::Caller);
                    machine.run().unwrap();
                });
            });
        }
        other => panic!("{other}"),
    }
    println!("{DONE}");
}

fn run(machine: &mut Machine) {
    machine.clear();
    machine.run().unwrap();
}

fn called_back(kvm: &Kvm) {
    let mut machine = Machine::new(kvm);
    machine.add_slot(1 << 30, VERY_MUCH);
    for kick in [Kick::ByEintr, Kick::ByFlag] {
        machine.clear();
        let (result, present) = machine.run_and_call_back(kick, VERY_MUCH / 16);
        assert_eq!(result.map_err(|error| error.errno()), Err(libc::EINTR));
        assert!(present < VERY_MUCH / 2, "the call waited for the run's end: {present}");
    }
    run(&mut machine);
}

fn slots(kvm: &Kvm) {
    let mut machine = Machine::new(kvm);
    run(&mut machine);
    machine.add_slot(8 << 30, BYTES);
    (0..8).for_each(|_| run(&mut machine));
}

fn fork(kvm: &Kvm) {
    let mut own = Machine::new(kvm);
    run(&mut own);
    // SAFETY: the child does what one thread can do alone: the harness's other threads hold no lock that it takes, and
    // the C library makes its allocator whole in the child.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", io::Error::last_os_error());
    if child == 0 {
        // The parent's VM is of no use here, and must do no harm.
        let refused = own.run().is_err_and(|error| error.errno() == libc::EIO);
        run(&mut Machine::new(kvm));
        // SAFETY: ends the child alone; there is nothing to be done at its exit.
        unsafe { libc::_exit(if refused { 7 } else { 8 }) };
    }
    let mut status = 0;
    // SAFETY: `status` has room for the answer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 7, "{status:#x}");
    run(&mut own);
}

fn errno(kvm: &Kvm) {
    let fails = |fd: libc::c_int, request: libc::c_ulong, argument: libc::c_ulong, errno: libc::c_int| {
        // SAFETY: the requests take numbers or an address that is not mapped, and KVM refuses each of them.
        let value = unsafe { libc::ioctl(fd, request, argument) };
        assert_eq!((value, io::Error::last_os_error().raw_os_error()), (-1, Some(errno)), "{request:#x}");
    };
    let vm = kvm.create_vm().unwrap();
    for _ in 0..2 {
        fails(-1, RUN, 0, libc::EBADF);
        fails(-1, CREATE_VM, 0, libc::EBADF);
        fails(kvm.as_raw_fd(), CREATE_VM, libc::c_ulong::MAX, libc::EINVAL);
        fails(vm.as_raw_fd(), CREATE_VCPU, 1 << 30, libc::EINVAL);
        fails(vm.as_raw_fd(), SET_USER_MEMORY_REGION, 8, libc::EFAULT);
    }
}
