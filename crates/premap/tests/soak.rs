//! A VMM lives for months: a thousand runs in the background leave nothing behind. One test, since it counts what the process has.

use std::time::{Duration, Instant};

use premap::{Backing, Engine, Gate, Gpa, GpaRange, Hva, Plan, Region, Stages, Stop, Touch};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// Maps all but each fifth page.
struct Patchy;

impl Vcpu for Patchy {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        if (range.gpa / PAGE).is_multiple_of(5) {
            return Err(Errno::NOENT);
        }
        (range.gpa, range.size) = (range.gpa + PAGE, range.size - PAGE);
        Ok(())
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

/// Threads, descriptors and mappings of this process, and its private memory in KiB.
#[derive(Debug)]
struct Held {
    threads: usize,
    descriptors: usize,
    mappings: usize,
    kib: u64,
}

fn held() -> Held {
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).expect("/proc is there").count();
    let read = |what: &str| std::fs::read_to_string(format!("/proc/self/{what}")).expect("/proc is there");
    let status = read("status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux 4.5 has it");
    Held {
        threads: count("task"),
        descriptors: count("fd"),
        mappings: read("maps").lines().count(),
        kib: line.trim().trim_end_matches("kB").trim().parse().expect("a number"),
    }
}

/// One of some ways in which a run comes to its end.
fn run(number: u64, gate: &Gate, stop: &Stop) {
    let range = GpaRange::new(Gpa::new(0), PAGES * PAGE);
    // Nothing is mapped there: that is accounted for too.
    let region = Region { range, host: Hva::new(PAGE), backing: Backing::Anonymous, touch: Touch::Write };
    let plan = Plan::new([region]).and_then(|plan| plan.with_chunk(4 * PAGE)).expect("the region is aligned");
    let stages = if number.is_multiple_of(4) { Stages::Both } else { Stages::Second };
    let engine = Engine::new().stages(stages).gate(gate).stop(stop).host_threads(1);
    let background = engine.background(plan, vec![Patchy, Patchy]).expect("threads can be had");
    let guard = background.gate().close();
    guard.forget(GpaRange::new(Gpa::new(number % PAGES * PAGE), PAGE));
    drop(guard);
    match number % 3 {
        0 => drop(background),
        1 => {
            background.stop();
            let report = background.join().expect("threads can be had");
            assert_eq!(report.second.bytes(), report.asked);
        }
        _ => {
            let report = background.join().expect("threads can be had");
            assert_eq!((report.host.bytes(), report.second.bytes()), (report.asked, report.asked));
        }
    }
}

#[test]
fn a_thousand_runs_in_the_background_leave_no_thread_descriptor_mapping_or_memory() {
    let (gate, stop) = (Gate::new(), Stop::new());
    // What is made once, such as the heaps of threads, is there afterwards.
    (0..200).for_each(|number| run(number, &gate, &stop));
    std::thread::sleep(Duration::from_millis(20));
    let before = held();
    (200..1200).for_each(|number| run(number, &gate, &stop));
    // A thread that was joined may be listed for a moment longer.
    let begin = Instant::now();
    while held().threads != before.threads && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let after = held();
    assert_eq!((after.threads, after.descriptors), (before.threads, before.descriptors));
    assert!(after.mappings <= before.mappings + 16, "{before:?}, then {after:?}");
    // A kibibyte a run would be one mebibyte.
    assert!(after.kib <= before.kib + 768, "{before:?}, then {after:?}");
}
