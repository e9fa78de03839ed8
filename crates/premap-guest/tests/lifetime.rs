//! Memory lives as long as a guest can reach it, whatever safe code does with a machine's parts.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_guest::{
    Access, Backing, Guest, Kernel, Linux, Machine, Memory, Mode, Order, SlotFlags, Soft, Touch, word_of,
};
use premap_softkvm::{GuestFault, Profile, SoftConfig, Tdp};

const BASE: Gpa = Gpa::new(4 << 30);
const PAGES: u64 = 16;

fn touch(access: Access) -> Touch {
    Touch { range: GpaRange::new(BASE, PAGES * PAGE_SIZE), access, order: Order::Ascending }
}

/// A machine whose guest has written its memory.
fn written<K: Kernel>(kernel: &K) -> Machine<K> {
    let mut machine = Machine::new(kernel, 1).unwrap();
    let memory = Memory::new(PAGES * PAGE_SIZE, Backing::Anonymous).unwrap();
    machine.slots().add(BASE, memory, SlotFlags::NONE).unwrap();
    machine.touch(&touch(Access::Write)).unwrap();
    machine
}

/// The vCPUs of two machines change places, and one machine ends: its vCPU, in the other, has no memory any more.
fn a_vcpu_that_was_swapped_away_reaches_no_freed_memory<K: Kernel>(kernel: &K) {
    let (mut kept, mut ended) = (written(kernel), written(kernel));
    std::mem::swap(&mut kept.lend().vcpus[0], &mut ended.lend().vcpus[0]);
    let sum = (0..PAGES).map(word_of).fold(0, u64::wrapping_add);
    assert_eq!(kept.touch(&touch(Access::Read)).unwrap().sum, sum);
    drop(ended);
    // Not what lies there next, either.
    let _other = Memory::new(PAGES * PAGE_SIZE, Backing::Anonymous).unwrap();
    kept.touch(&touch(Access::Write)).unwrap_err();
}

#[test]
fn a_swapped_vcpu_on_the_software_kvm_reaches_no_freed_memory() {
    for tdp in [Tdp::On, Tdp::Off] {
        let config = SoftConfig { tdp, ..SoftConfig::default() };
        a_vcpu_that_was_swapped_away_reaches_no_freed_memory(&Soft::with_config(config));
    }
}

#[test]
fn a_swapped_vcpu_on_linux_reaches_no_freed_memory() {
    match Linux::open() {
        Ok(linux) => a_vcpu_that_was_swapped_away_reaches_no_freed_memory(&linux),
        Err(error) => {
            assert!(std::env::var_os("PREMAP_LAB").is_none_or(|value| value != "1"), "in the lab: {error}");
            eprintln!("skipped: {error}");
        }
    }
}

#[test]
fn a_clone_of_the_vm_reaches_no_freed_memory() {
    let machine = written(&Soft::new(Profile::default()));
    let vm = machine.vm().soft().clone();
    let mut vcpu = vm.create_vcpu(7).unwrap();
    assert_eq!(vcpu.read(BASE), Ok(word_of(0)));
    drop(machine);
    assert_eq!(vcpu.read(BASE), Err(GuestFault::Mmio { gpa: BASE }));
}

/// The page tables of a guest are memory too, which the KVM itself reads where it shadows them.
#[test]
fn the_tables_of_a_guest_outlive_a_vcpu_that_was_swapped_into_another() {
    let soft = Soft::with_config(SoftConfig { tdp: Tdp::Off, ..SoftConfig::default() });
    let (mut kept, mut ended) = (written(&soft), written(&soft));
    for machine in [&mut kept, &mut ended] {
        machine.lend().vcpus[0].enter(Mode::Paging).unwrap();
    }
    std::mem::swap(kept.lend().vcpus[0].soft(), ended.lend().vcpus[0].soft());
    drop(ended);
    kept.touch(&touch(Access::Read)).unwrap_err();
}
