//! One body for every kernel: the guest touches what it is told to, and KVM's counts say what that cost.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_guest::{
    Access, Backing, GuestError, Kernel, Linux, Machine, MachineError, Memory, Order, SlotFlags, SlotId,
    Touch, word_of,
};
use premap_kvm::{Errno, probe};

const BASE: Gpa = Gpa::new(4 << 30);

/// `/dev/kvm`, unless it can't be had.
fn linux() -> Option<Linux> {
    Linux::open().map_err(|error| skip(&format!("/dev/kvm: {error}"))).ok()
}

/// Says why a test does not run here. In the lab (`PREMAP_LAB=1`), which exists so that it can, that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("PREMAP_LAB").is_none_or(|value| value != "1"), "must run in the lab: {why}");
    eprintln!("skipped: {why}");
}

/// Runs a test's body on every kernel in reach.
macro_rules! on_each_kernel {
    ($($name:ident)+) => {
        mod on_soft {
            $(#[test]
            fn $name() {
                super::$name(&premap_guest::Soft::new(premap_softkvm::Profile::default()));
            })+
        }


        mod on_linux {
            $(#[test]
            fn $name() {
                if let Some(linux) = super::linux() {
                    super::$name(&linux);
                }
            })+
        }
    };
}

on_each_kernel! {
    words_written_by_the_guest_are_found_in_its_memory
    reads_sum_what_the_host_wrote_and_change_nothing
    every_backing_can_be_touched
    a_touch_costs_a_fault_a_page_and_is_counted
    a_write_to_a_read_only_slot_names_its_address
    a_touch_beyond_the_slots_names_its_address
    slots_come_and_go
    what_the_host_takes_back_is_seen_by_the_guest
}

/// A machine with one slot of so many pages at 4 GiB.
fn machine<K: Kernel>(kernel: &K, vcpus: u32, pages: u64, backing: Backing) -> (Machine<K>, SlotId) {
    let mut machine = Machine::new(kernel, vcpus).unwrap();
    let memory = Memory::new(pages * PAGE_SIZE, backing).unwrap();
    let slot = machine.slots().add(BASE, memory, SlotFlags::NONE).unwrap();
    (machine, slot)
}

fn touch(pages: u64, access: Access, order: Order) -> Touch {
    Touch { range: GpaRange::new(BASE, pages * PAGE_SIZE), access, order }
}

fn words<K: Kernel>(machine: &Machine<K>, slot: SlotId) -> Vec<u64> {
    let memory = machine.slot(slot).unwrap().memory();
    (0..memory.bytes() / PAGE_SIZE).map(|index| memory.read_word(index * PAGE_SIZE)).collect()
}

fn words_written_by_the_guest_are_found_in_its_memory<K: Kernel>(kernel: &K) {
    for order in [Order::Ascending, Order::Random] {
        for (vcpus, pages) in [(1, 1), (1, 1_000), (2, 1_001), (4, 3)] {
            let (mut machine, slot) = machine(kernel, vcpus, pages + 1, Backing::Anonymous);
            machine.touch(&touch(pages, Access::Write, order)).unwrap();
            let expected: Vec<_> = (0..pages).map(word_of).chain([0]).collect();
            assert_eq!(words(&machine, slot), expected, "{order:?}, {vcpus} vCPUs");
        }
    }
}

fn reads_sum_what_the_host_wrote_and_change_nothing<K: Kernel>(kernel: &K) {
    let (mut machine, slot) = machine(kernel, 2, 1_000, Backing::Memfd);
    let memory = machine.slot(slot).unwrap().memory();
    (0..1_000).for_each(|index| memory.write_word(index * PAGE_SIZE, index * index));
    let run = machine.touch(&touch(1_000, Access::Read, Order::Random)).unwrap();
    assert_eq!(run.sum, (0..1_000).map(|index| index * index).sum::<u64>());
    assert_eq!(words(&machine, slot), (0..1_000).map(|index| index * index).collect::<Vec<_>>());
}

fn every_backing_can_be_touched<K: Kernel>(kernel: &K) {
    for backing in Backing::ALL {
        match Memory::new(4 << 20, backing) {
            Err(error) if backing == Backing::Hugetlb => skip(&format!("{backing}: {error}")),
            Err(error) => panic!("{backing}: {error}"),
            Ok(memory) => {
                let mut machine = Machine::new(kernel, 1).unwrap();
                let slot = machine.slots().add(BASE, memory, SlotFlags::NONE).unwrap();
                machine.touch(&touch(1_024, Access::Write, Order::Ascending)).unwrap();
                assert!(words(&machine, slot).into_iter().eq((0..1_024).map(word_of)), "{backing}");
            }
        }
    }
}

fn a_touch_costs_a_fault_a_page_and_is_counted<K: Kernel>(kernel: &K) {
    let (mut machine, _) = machine(kernel, 1, 2_000, Backing::Anonymous);
    let lent = machine.lend();
    let support = probe::pre_fault(lent.vm, &mut lent.vcpus[0]);
    if !support.is_supported() {
        // One such KVM emulates every instruction of a guest like this one, and takes no fault at all.
        skip(&format!("fault counts are only known where EPT or NPT maps the guest: {support}"));
        return;
    }
    machine.map_own_memory(touch(2_000, Access::Write, Order::Ascending).range).unwrap();
    let first = machine.touch(&touch(2_000, Access::Write, Order::Ascending)).unwrap();
    assert!(first.faults >= 2_000, "{} faults for 2,000 pages", first.faults);
    assert!(first.exits >= first.faults, "{first:?}");
    assert!(machine.mapped().unwrap().pages_4k >= 2_000, "{:?}", machine.mapped());
    let again = machine.touch(&touch(2_000, Access::Write, Order::Random)).unwrap();
    assert!(again.faults < 16, "{} faults for pages that are all mapped", again.faults);
}

fn a_write_to_a_read_only_slot_names_its_address<K: Kernel>(kernel: &K) {
    let mut machine = Machine::new(kernel, 1).unwrap();
    let memory = Memory::new(4 * PAGE_SIZE, Backing::Anonymous).unwrap();
    machine.slots().add(BASE, memory, SlotFlags::READ_ONLY).unwrap();
    machine.touch(&touch(4, Access::Read, Order::Ascending)).unwrap();
    let error = machine.touch(&touch(4, Access::Write, Order::Ascending)).unwrap_err();
    let mmio = GuestError::Mmio { gpa: BASE, access: Access::Write };
    assert_eq!(error, MachineError::Guest { vcpu: 0, error: mmio });
}

fn a_touch_beyond_the_slots_names_its_address<K: Kernel>(kernel: &K) {
    let (mut machine, _) = machine(kernel, 1, 4, Backing::Anonymous);
    let error = machine.touch(&touch(5, Access::Read, Order::Ascending)).unwrap_err();
    let mmio = GuestError::Mmio { gpa: BASE.wrapping_add(4 * PAGE_SIZE), access: Access::Read };
    assert_eq!(error, MachineError::Guest { vcpu: 0, error: mmio });
}

fn slots_come_and_go<K: Kernel>(kernel: &K) {
    let (mut machine, slot) = machine(kernel, 1, 8, Backing::Anonymous);
    machine.touch(&touch(8, Access::Write, Order::Ascending)).unwrap();
    machine.slots().set_flags(slot, SlotFlags::LOG_DIRTY).unwrap();
    assert_eq!(machine.slot(slot).unwrap().flags(), SlotFlags::LOG_DIRTY);
    machine.touch(&touch(8, Access::Write, Order::Random)).unwrap();
    let memory = machine.slots().remove(slot).unwrap();
    assert_eq!(memory.read_word(7 * PAGE_SIZE), word_of(7));
    assert!(machine.touch(&touch(8, Access::Read, Order::Ascending)).is_err());
    assert_eq!(machine.slots().remove(slot).unwrap_err(), MachineError::NoSlot(slot.number()));
    machine.slots().add(BASE, memory, SlotFlags::NONE).unwrap();
    let run = machine.touch(&touch(8, Access::Read, Order::Ascending)).unwrap();
    assert_eq!(run.sum, (0..8).map(word_of).fold(0, u64::wrapping_add));
}

fn what_the_host_takes_back_is_seen_by_the_guest<K: Kernel>(kernel: &K) {
    let (mut machine, slot) = machine(kernel, 1, 8, Backing::Memfd);
    machine.touch(&touch(8, Access::Write, Order::Ascending)).unwrap();
    machine.slots().discard(slot, 0..4 * PAGE_SIZE).unwrap();
    let run = machine.touch(&touch(8, Access::Read, Order::Ascending)).unwrap();
    assert_eq!(run.sum, (4..8).map(word_of).fold(0, u64::wrapping_add));
    machine.slots().revoke(slot, 6 * PAGE_SIZE..8 * PAGE_SIZE).unwrap();
    machine.touch(&touch(6, Access::Write, Order::Ascending)).unwrap();
    let error = machine.touch(&touch(8, Access::Read, Order::Ascending)).unwrap_err();
    let efault = GuestError::Call { call: "KVM_RUN", errno: Errno::FAULT };
    // A KVM that emulates the guest's instructions takes an address without host memory for a device's.
    let mmio = GuestError::Mmio { gpa: BASE.wrapping_add(6 * PAGE_SIZE), access: Access::Read };
    let expected = [efault, mmio].map(|error| MachineError::Guest { vcpu: 0, error });
    assert!(expected.contains(&error), "{error:?}");
}
