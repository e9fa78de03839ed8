//! What pre-faulting resident memory of 4 KiB pages costs, all told, on one vCPU and on two.
//!
//! Each round maps everything anew in a fresh VM. `premap` is the wall-clock time; `premap_processor`, the threads' own, says
//! more where the machine has other work. The median counts, and the spread is (max - min) / median. `--mib N` sets the
//! memory, `--rounds N` how often it is mapped.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::ops::Range;
use std::thread;
use std::time::Instant;

use bench_report::{Line, flag, json, wants_json};
use guest::{Memory, attach, mapped, pre_fault_all, vm};
use premap_address::PAGE_SIZE;
use premap_softkvm::{Profile, SoftVm};
use rustix::time::{ClockId, clock_gettime};

const GPA: u64 = 1 << 32;

/// What one round cost, in nanoseconds a page.
struct Cost {
    elapsed: f64,
    processor: f64,
}

/// Pre-faults some pages; returns the processor time that it took this thread, in nanoseconds.
fn part(vm: &SoftVm, id: u32, pages: Range<u64>) -> f64 {
    let mut vcpu = vm.create_vcpu(id).unwrap_or_else(|errno| panic!("no vCPU: {errno}"));
    let before = processor_time();
    pre_fault_all(&mut vcpu, GPA + pages.start * PAGE_SIZE, pages.end - pages.start);
    processor_time() - before
}

/// The processor time of this thread so far, in nanoseconds.
fn processor_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "a thread of this program runs for seconds")]
    let (seconds, nanoseconds) = (time.tv_sec as f64, time.tv_nsec as f64);
    seconds * 1e9 + nanoseconds
}

fn round(memory: &Memory, vcpus: u32) -> Cost {
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, memory);
    let pages = memory.pages();
    let share = pages / u64::from(vcpus);
    let start = Instant::now();
    let processor: f64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..vcpus)
            .map(|id| {
                let vm = &vm;
                let first = u64::from(id) * share;
                scope.spawn(move || part(vm, id, first..first + share))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or(f64::NAN)).sum()
    });
    let elapsed = start.elapsed().as_secs_f64() * 1e9;
    assert_eq!(mapped(&vm), [pages, 0, 0], "every page is mapped, and mapped small");
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 pages")]
    let pages = pages as f64;
    Cost { elapsed: elapsed / pages, processor: processor / pages }
}

fn main() {
    let (mebibytes, rounds) = (flag("--mib", 4096), flag("--rounds", 9));
    let memory = Memory::anonymous(mebibytes as u64 * 256);
    memory.populate_write(0..memory.pages());
    let mut costs = [1, 2].map(|vcpus| (vcpus, Vec::new()));
    for _ in 0..rounds {
        for (vcpus, costs) in &mut costs {
            costs.push(round(&memory, *vcpus));
        }
    }
    let mut lines = Vec::new();
    for (vcpus, costs) in costs {
        for (subject, of) in [
            ("premap", (|cost| cost.elapsed) as fn(&Cost) -> f64),
            ("premap_processor", |cost| cost.processor),
        ] {
            let samples = costs.iter().map(of).collect();
            lines.push(Line::new(("prefault_4k", subject), vcpus as usize, "ns/page", samples));
        }
    }
    if wants_json() {
        println!("{}", json(&lines).expect("lines are plain"));
    } else {
        lines.iter().for_each(|line| println!("{line}"));
    }
}
