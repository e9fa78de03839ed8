//! Memory that is mapped while the guest runs, on a vCPU that it never hears of.

use std::thread;
use std::time::Duration;

use premap::{Background, Engine, Gate, Plan, Reason, Report, Stage, Touch};
use premap_guest::{Backing, Kernel, Lent, Memory, Run, SlotFlags, Slots};

use super::FEW;
use crate::fixture::{BASE, Fixture, PAGE, check_sums, lost, pages, plan};

/// 16 MiB, mapped in 64 chunks: some tens of milliseconds on the slowest kernel.
const PAGES: u64 = 4096;
const CHUNK: u64 = 64 * PAGE;

/// The guest runs from the start and has right what it wrote; what it had not reached yet was mapped for it.
pub fn memory_is_mapped_while_the_guest_runs<K: Kernel>(kernel: &K) {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mut fixture = Fixture::with_spare(kernel, PAGES, backing);
        let plan = fixture.plan();
        let (report, run) = beside_the_guest(&mut fixture, Engine::new(), plan, |background, _| {
            background.join().expect("threads can be had")
        });
        assert!(report.is_complete(), "{backing}: {report:?}");
        assert!(run.faults <= PAGES + FEW, "{backing}: {} faults", run.faults);
        let run = fixture.write_all();
        assert!(run.faults <= FEW, "{backing}: {} faults on memory mapped meanwhile", run.faults);
    }
}

/// A stop while both are at work: every byte is accounted for, nothing that the guest wrote is lost, and another run maps
/// the rest.
pub fn a_stop_midway_loses_nothing<K: Kernel>(kernel: &K) {
    for attempt in 0..20 {
        let mut fixture = Fixture::with_spare(kernel, PAGES, Backing::Anonymous);
        let plan = fixture.plan();
        let (report, _) = beside_the_guest(&mut fixture, Engine::new(), plan, |background, _| {
            while background.progress().second <= attempt * CHUNK && !background.is_finished() {
                thread::yield_now();
            }
            background.stop();
            background.join().expect("threads can be had")
        });
        if report.second.mapped == 0 || report.second.abandoned == 0 {
            continue;
        }
        for stage in [Stage::Host, Stage::Second] {
            assert!(lost(&report, stage).iter().all(|(_, why)| *why == Reason::Stopped), "{report:?}");
        }
        assert!(fixture.map(Engine::new(), &fixture.plan()).is_complete());
        assert!(fixture.write_all().faults <= FEW);
        return;
    }
    panic!("none of 20 stops fell midway");
}

/// Another slot is made and deleted a hundred times while memory is mapped and the guest writes it: neither hangs, and
/// nothing is lost. Each deletion leaves the spare vCPU a stale root, on which Linux before 6.15 would spin, and on a slot
/// that is being deleted Linux before 6.18 would: the guard keeps the engine clear of both.
pub fn slots_come_and_go_under_the_guard<K: Kernel>(kernel: &K) {
    const TIMES: usize = 100;
    let gate = Gate::new();
    let mut changes = 0;
    while changes < TIMES {
        let mut fixture = Fixture::with_spare(kernel, PAGES, Backing::Anonymous);
        // The watchdog would cover for a guard that does not hold.
        let engine = Engine::new().gate(&gate).patience(Duration::from_secs(3600));
        let plan = fixture.plan();
        let (report, run) = beside_the_guest(&mut fixture, engine, plan, |background, slots| {
            while changes < TIMES && !background.is_finished() {
                come_and_go::<K>(slots, &gate);
                changes += 1;
                let seen = background.progress().second;
                while background.progress().second == seen && !background.is_finished() {
                    thread::yield_now();
                }
            }
            background.join().expect("threads can be had")
        });
        assert!(report.is_complete(), "{report:?}");
        // Deleting a slot discards what is mapped of the whole VM, so pages may fault again: written, they fault once each.
        assert!(run.faults <= 2 * PAGES + FEW, "{} faults", run.faults);
        let again = fixture.map(Engine::new().patience(Duration::from_millis(200)), &fixture.plan());
        assert!(again.is_complete(), "{again:?}");
        assert!(fixture.write_all().faults <= FEW);
    }
}

/// A slot is deleted and its memory unmapped while the engine is at it: what was not mapped yet is skipped at both stages, to
/// the byte, and the rest of the plan is mapped.
pub fn a_slot_that_goes_with_its_memory_is_skipped<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::with_spare(kernel, PAGES, Backing::Anonymous);
    let gone = pages(2 * PAGES, PAGES);
    let memory = Memory::new(gone.bytes(), Backing::Anonymous).expect("16 MiB can be had");
    let regions = [memory.region(gone.start(), Touch::Write), fixture.region(Touch::Write)];
    let slot =
        fixture.machine.slots().add(gone.start(), memory, SlotFlags::NONE).expect("the slot can be made");
    let plan = plan(regions);
    let (report, _) = beside_the_guest(&mut fixture, Engine::new(), plan, |background, slots| {
        while background.progress().second == 0 {
            thread::yield_now();
        }
        let guard = background.gate().close();
        guard.forget(gone);
        drop(slots.remove(slot).expect("the slot can be removed"));
        drop(guard);
        background.join().expect("threads can be had")
    });
    for (stage, sums) in [(Stage::Host, report.host), (Stage::Second, report.second)] {
        let skipped = lost(&report, stage);
        assert!(skipped.iter().all(|(_, why)| *why == Reason::Forgotten), "{report:?}");
        assert!(skipped.iter().all(|(range, _)| range.intersection(gone) == Some(*range)), "{report:?}");
        assert!(sums.mapped > PAGES * PAGE, "something of both slots was mapped: {report:?}");
    }
}

/// Makes a slot behind the fixture's and deletes it again, each under the guard.
fn come_and_go<K: Kernel>(slots: &mut Slots<'_, K::Vm>, gate: &Gate) {
    let memory = Memory::new(16 * PAGE, Backing::Anonymous).expect("64 KiB can be had");
    let guard = gate.close();
    let slot = slots.add(BASE.wrapping_add(2 * PAGES * PAGE), memory, SlotFlags::NONE);
    drop(guard);
    let guard = gate.close();
    slots.remove(slot.expect("the slot can be made")).expect("the slot can be removed");
    drop(guard);
}

/// Lets the guest write every page from the start while the engine maps them on the spare vCPU, and the VMM does something
/// with that run. Checks that the report adds up and that the guest's writes are there.
fn beside_the_guest<K: Kernel>(
    fixture: &mut Fixture<K>,
    engine: Engine<'_>,
    plan: Plan,
    vmm: impl FnOnce(Background<'_>, &mut Slots<'_, K::Vm>) -> Report,
) -> (Report, Run) {
    let writes = fixture.writes();
    fixture.machine.map_own_memory(writes.range).expect("the guest reaches its memory");
    let plan = plan.with_chunk(CHUNK).expect("a chunk is made of pages");
    let Lent { vcpus, spares, mut slots, .. } = fixture.machine.lend();
    let (report, run) = thread::scope(|scope| {
        let spares = spares.iter_mut().collect();
        let background = engine.background_scoped(scope, plan.clone(), spares).expect("the run can begin");
        let guest = scope.spawn(|| writes.run(vcpus).expect("the guest runs to its end"));
        let report = vmm(background, &mut slots);
        (report, guest.join().expect("the guest's thread does not panic"))
    });
    check_sums(&report, &plan);
    fixture.check_written();
    (report, run)
}
