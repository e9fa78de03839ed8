//! Runs that are cut short, or disturbed: nothing hangs, nothing is lost, and what is left can be mapped later.

use std::thread;
use std::time::{Duration, Instant};

use premap::{Budget, Engine, GpaRange, Hva, Plan, Reason, Region, Report, Stage, Stop, Touch as HostTouch};
use premap_guest::{Backing, Kernel};

use super::FEW;
use crate::fixture::{BASE, Fixture, PAGE, lost, plan};
use crate::storm;

/// 32 MiB: some tens of milliseconds on the slowest kernel.
const PAGES: u64 = 8192;

/// A deadline that passes midway leaves the rest abandoned, in order, and a later run maps it.
pub fn a_deadline_hits_midway<K: Kernel>(kernel: &K) {
    cut_midway(kernel, Reason::Deadline, |after, run| {
        run(Engine::new().budget(Budget { deadline: Some(Instant::now() + after), ..Budget::default() }))
    });
}

/// The same for a stop from another thread.
pub fn a_stop_from_another_thread_hits_midway<K: Kernel>(kernel: &K) {
    cut_midway(kernel, Reason::Stopped, |after, run| {
        let stop = Stop::new();
        let stopper = stop.clone();
        let timer = thread::spawn(move || {
            thread::sleep(after);
            stopper.stop();
        });
        run(Engine::new().stop(&stop));
        timer.join().expect("the timer does not panic");
    });
}

/// Runs with ever other times to the cut until one falls between the first byte and the last, and checks that run.
fn cut_midway<K: Kernel>(kernel: &K, why: Reason, cut: impl Fn(Duration, &mut dyn FnMut(Engine<'_>))) {
    let whole = {
        let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
        let plan = fixture.plan();
        Duration::from_nanos(fixture.map(Engine::new(), &plan).wall_ns)
    };
    for attempt in 1..=20 {
        let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
        let plan = fixture.plan();
        let mut report = Report::default();
        cut(whole * attempt / 20, &mut |engine| report = fixture.map(engine, &plan));
        if report.second.mapped > 0 && report.second.abandoned > 0 {
            check_cut(fixture, &report, why);
            return;
        }
    }
    panic!("none of 20 cuts within {whole:?} fell midway");
}

fn check_cut<K: Kernel>(mut fixture: Fixture<K>, report: &Report, why: Reason) {
    for stage in [Stage::Host, Stage::Second] {
        assert!(lost(report, stage).iter().all(|(_, reason)| *reason == why), "{report:?}");
    }
    let left: Vec<_> = report.abandoned(Stage::Second).collect();
    assert!(left.is_sorted(), "what is left is not in the plan's order: {left:?}");
    let rest = fixture.map(Engine::new(), &part_of(&fixture, &left));
    assert!(rest.is_complete(), "{rest:?}");
    let run = fixture.write_all();
    assert!(run.faults <= FEW, "{} faults after the rest was mapped", run.faults);
}

/// A byte budget is used up to the byte, from the plan's front, and the rest can be mapped later.
pub fn a_byte_budget_is_kept_and_the_rest_can_be_mapped_later<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 2, PAGES, Backing::Memfd);
    let budget = Budget { bytes: Some(777 * PAGE), ..Budget::default() };
    let report = fixture.map(Engine::new().budget(budget), &fixture.plan());
    assert_eq!((report.host.mapped, report.second.mapped), (777 * PAGE, 777 * PAGE));
    let left: Vec<_> = report.abandoned(Stage::Second).collect();
    assert_eq!(left, [crate::fixture::pages(777, PAGES - 777)]);
    assert!(fixture.map(Engine::new(), &part_of(&fixture, &left)).is_complete());
    assert!(fixture.write_all().faults <= FEW);
}

/// A thousand signals a second at the workers neither hang the run nor lose a byte.
pub fn a_signal_storm_loses_nothing<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 2, PAGES, Backing::Anonymous);
    let plan = fixture.plan();
    let (report, sent) = storm::during("premap-", || {
        let mut report = fixture.map(Engine::new(), &plan);
        // Mapping what is present is quick; it is done until the storm has really blown.
        for _ in 0..50 {
            assert!(report.is_complete(), "{report:?}");
            report = fixture.map(Engine::new(), &plan);
        }
        report
    });
    assert!(report.is_complete(), "{report:?}");
    assert!(sent > 0, "no signal met a worker");
    assert!(fixture.write_all().faults <= FEW);
}

fn part_of<K: Kernel>(fixture: &Fixture<K>, ranges: &[GpaRange]) -> Plan {
    let whole = fixture.region(HostTouch::Write);
    plan(ranges.iter().map(|range| {
        let offset = range.start().checked_offset_from(BASE).expect("the ranges lie in the slot");
        Region { range: *range, host: Hva::new(whole.host.raw() + offset), ..whole }
    }))
}
