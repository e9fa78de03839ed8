//! Ranges that can't be mapped whole: each ends with the right bytes in the right place of the report.

use std::time::Duration;

use premap::{Engine, Reason, Stage, Stages, Touch as HostTouch};
use premap_guest::{
    Access, Backing, GuestError, Kernel, Machine, MachineError, Memory, Order, SlotFlags, Touch,
};
use premap_kvm::Errno;

use super::FEW;
use crate::fixture::{BASE, Fixture, PAGE, lost, map, pages, plan};

/// Slots on both sides of a hole, one range over all of it: the hole is skipped, to the byte.
pub fn a_hole_in_the_middle_is_skipped_to_the_byte<K: Kernel>(kernel: &K) {
    let mut machine = Machine::new(kernel, 1).expect("a machine can be made");
    for first in [0, 700] {
        let memory = Memory::new(300 * PAGE, Backing::Anonymous).expect("1.2 MiB can be had");
        machine
            .slots()
            .add(BASE.wrapping_add(first * PAGE), memory, SlotFlags::NONE)
            .expect("the slot can be made");
    }
    // One piece of host memory stands for the whole range: the second stage asks the slots, not the plan, what is there.
    let whole = Memory::new(1000 * PAGE, Backing::Anonymous).expect("4 MiB can be had");
    let plan = plan([whole.region(BASE, HostTouch::Write)]);
    let report = map(&mut machine, Engine::new(), &plan);
    assert_eq!(lost(&report, Stage::Second), [(pages(300, 400), Reason::NoMemslot)]);
    assert_eq!((report.second.mapped, report.host.mapped), (600 * PAGE, 1000 * PAGE));
}

/// A read-only slot is mapped, and stays read-only.
pub fn a_read_only_slot_is_mapped_for_reading<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::with_flags(kernel, 1, 64, Backing::File, SlotFlags::READ_ONLY);
    let report = fixture.map(Engine::new(), &plan([fixture.region(HostTouch::Read)]));
    assert!(report.is_complete(), "{report:?}");
    let run = fixture.read_all();
    assert!(run.faults <= FEW, "{} faults for reading", run.faults);
    let before = fixture.memory().read_word(0);
    let write = Touch { range: pages(0, 1), access: Access::Write, order: Order::Ascending };
    let refused = fixture.machine.touch(&write);
    assert!(
        matches!(refused, Err(MachineError::Guest { error: GuestError::Mmio { gpa, .. }, .. }) if gpa == BASE),
        "a write to a read-only slot gave {refused:?}"
    );
    assert_eq!(fixture.memory().read_word(0), before);
}

/// Pages whose host memory was taken away fail, to the byte, at the stage that meets them first.
pub fn unmapped_host_memory_fails_to_the_byte<K: Kernel>(kernel: &K) {
    let holed = || {
        let mut fixture = Fixture::new(kernel, 1, 512, Backing::Anonymous);
        let slot = fixture.slot;
        fixture.machine.slots().revoke(slot, 100 * PAGE..103 * PAGE).expect("a part can be taken away");
        fixture
    };
    let mut fixture = holed();
    let report = fixture.map(Engine::new(), &fixture.plan());
    assert_eq!(lost(&report, Stage::Host), [(pages(100, 3), Reason::NoAccess)]);
    assert_eq!(lost(&report, Stage::Second), [(pages(100, 3), Reason::HostStageFailed)]);
    assert_eq!(report.second.mapped, 509 * PAGE);

    let mut fixture = holed();
    let report = fixture.map(Engine::new().stages(Stages::Second), &fixture.plan());
    assert_eq!(lost(&report, Stage::Second), [(pages(100, 3), Reason::Errno(Errno::FAULT))]);
    assert_eq!(report.second.mapped, 509 * PAGE);
}

/// A slot that is gone before a vCPU was ever used is a hole.
pub fn a_slot_removed_before_the_run_is_skipped<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 1, 512, Backing::Anonymous);
    let plan = fixture.plan();
    let kept = fixture.machine.slots().remove(fixture.slot).expect("the slot can be removed");
    let report = fixture.map(Engine::new(), &plan);
    assert_eq!(lost(&report, Stage::Second), [(pages(0, 512), Reason::NoMemslot)]);
    assert_eq!(report.host.mapped, report.asked);
    drop(kept);
}

/// A slot that is gone after a vCPU mapped it leaves that vCPU a stale root. Linux before 6.15 spins on it until a signal
/// comes: the watchdog sends one, and the engine renews the root. Then it is a hole, as it is at once on later kernels.
pub fn a_slot_removed_under_a_used_vcpu_never_hangs<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 1, 512, Backing::Anonymous);
    let plan = fixture.plan();
    assert!(fixture.map(Engine::new(), &plan).is_complete());
    let kept = fixture.machine.slots().remove(fixture.slot).expect("the slot can be removed");
    let report = fixture.map(Engine::new().patience(Duration::from_millis(200)), &plan);
    assert_eq!(lost(&report, Stage::Second), [(pages(0, 512), Reason::NoMemslot)]);
    drop(kept);
}

/// Pre-mapping a slot whose writes are logged marks its pages written, since it maps them writable, and maps them by 4 KiB.
pub fn dirty_logging_counts_what_was_mapped_ahead<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::with_flags(kernel, 1, 1024, Backing::TransparentHuge, SlotFlags::LOG_DIRTY);
    assert_eq!(fixture.dirty(), 0);
    assert!(fixture.map(Engine::new(), &fixture.plan()).is_complete());
    let mapped = fixture.machine.mapped().expect("pages are counted");
    assert!(mapped.pages_4k >= 1024 && mapped.pages_2m == 0, "{mapped:?}");
    assert_eq!(fixture.dirty(), 1024);
    assert_eq!(fixture.dirty(), 0, "reading the log clears it");
}
