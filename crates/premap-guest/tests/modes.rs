//! Guests in every mode, on the software KVM under each of its MMUs.
// UNSAFETY: makes a slot of memory that the machine keeps.
#![expect(unsafe_code, reason = "the traits' unsafe methods")]
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_guest::{
    Access, Backing, Guest, GuestError, Machine, MachineError, Memory, Mode, Order, SlotFlags, Soft, Touch,
    word_of,
};
use premap_kvm::abi::{kvm_pre_fault_memory, kvm_userspace_memory_region};
use premap_kvm::{Errno, Vcpu, Vm};
use premap_softkvm::{Profile, SoftConfig, Tdp};

const PAGES: u64 = 64;
const GPA: u64 = 4 << 30;

fn range() -> GpaRange {
    GpaRange::new(Gpa::new(GPA), PAGES * PAGE_SIZE)
}

/// A machine with memory in both address spaces.
fn machine(tdp: Tdp, profile: Profile) -> Machine<Soft> {
    let kernel = Soft::with_config(SoftConfig { tdp, profile, ..SoftConfig::default() });
    let mut machine = Machine::new(&kernel, 2).unwrap();
    let memory = Memory::new(range().bytes(), Backing::Anonymous).unwrap();
    let region = kvm_userspace_memory_region {
        slot: 1 << 16,
        flags: 0,
        guest_phys_addr: GPA,
        memory_size: memory.bytes(),
        userspace_addr: memory.hva().raw(),
    };
    machine.slots().add(range().start(), memory, SlotFlags::NONE).unwrap();
    // SAFETY: the same memory, which the machine keeps as long as its VM.
    unsafe { machine.vm().set_user_memory_region(&region) }.unwrap();
    machine
}

fn touch(machine: &mut Machine<Soft>, access: Access) -> (u64, u64) {
    let run = machine.touch(&Touch { range: range(), access, order: Order::Random }).unwrap();
    (run.sum, run.faults)
}

#[test]
fn guests_reach_their_memory_in_every_mode() {
    let sum = (0..PAGES).map(word_of).fold(0, u64::wrapping_add);
    for tdp in [Tdp::On, Tdp::WithoutTdpMmu, Tdp::Off] {
        for mode in Mode::ALL {
            let mut machine = machine(tdp, Profile::V6_12);
            let entered: Vec<_> = machine.lend().vcpus.iter_mut().map(|vcpu| vcpu.enter(mode)).collect();
            if (tdp, mode) == (Tdp::Off, Mode::NestedPaging) {
                assert!(matches!(entered[0], Err(GuestError::NoMode { .. })), "{entered:?}");
                continue;
            }
            assert_eq!(entered, [Ok(()), Ok(())]);
            let (_, faults) = touch(&mut machine, Access::Write);
            assert!(faults >= PAGES, "{tdp:?}, {mode}: {faults} faults");
            assert_eq!(touch(&mut machine, Access::Read).0, sum, "{tdp:?}, {mode}");
            // And in the next one.
            for vcpu in machine.lend().vcpus {
                vcpu.enter(Mode::Paging).unwrap();
            }
            assert_eq!(touch(&mut machine, Access::Read).0, sum, "{tdp:?}, {mode}, then paging");
        }
    }
}

#[test]
fn what_can_be_pre_faulted_is_as_linux_has_it() {
    for (tdp, refused) in [
        (Tdp::On, &[Mode::NestedPaging][..]),
        (Tdp::WithoutTdpMmu, &[Mode::NestedPaging]),
        (Tdp::Off, &[Mode::Paging, Mode::PagingOff, Mode::SystemManagement, Mode::NestedShadow]),
    ] {
        for mode in Mode::ALL {
            let mut machine = machine(tdp, Profile::V7_2);
            let vcpu = &mut machine.lend().vcpus[0];
            if vcpu.enter(mode).is_err() {
                continue;
            }
            let mut left = kvm_pre_fault_memory { gpa: GPA, size: range().bytes(), ..Default::default() };
            let mut result = vcpu.pre_fault_memory(&mut left);
            while result.is_ok() && left.size > 0 {
                result = vcpu.pre_fault_memory(&mut left);
            }
            let expected = if refused.contains(&mode) { Err(Errno::OPNOTSUPP) } else { Ok(()) };
            assert_eq!(result, expected, "{tdp:?}, {mode}");
        }
    }
}

#[test]
fn shadowed_tables_reach_no_further_than_guests_on_dev_kvm() {
    let mut machine = machine(Tdp::Off, Profile::V6_12);
    let below = GpaRange::new(Gpa::new(1 << 30), PAGE_SIZE);
    let touched = machine.touch(&Touch { range: below, access: Access::Read, order: Order::Ascending });
    assert_eq!(touched, Err(MachineError::Guest { vcpu: 0, error: GuestError::OutOfReach(below) }));
}
