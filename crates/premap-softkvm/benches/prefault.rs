//! What pre-faulting resident memory of 4 KiB pages costs, all told, on one vCPU and on two.
//!
//! Each round maps everything anew in a fresh VM, on threads that begin together. `premap` is the wall-clock time from the
//! first one's begin to the last one's end; `premap_processor`, the threads' own, says more where the machine has other
//! work. The median counts, and the spread is (max - min) / median. `--mib N` sets the memory, `--rounds N` how often it is
//! mapped.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::hint;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

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

/// What a thread took: when it began and ended, and its processor time in nanoseconds.
struct Share {
    began: Instant,
    ended: Instant,
    processor: f64,
}

/// Pre-faults some pages when all threads are there.
fn part(vm: &SoftVm, id: u32, pages: Range<u64>, awaited: &AtomicU32) -> Share {
    let mut vcpu = vm.create_vcpu(id).unwrap_or_else(|errno| panic!("no vCPU: {errno}"));
    // Spinning, since waking a thread takes as long as mapping hundreds of megabytes here.
    awaited.fetch_sub(1, Ordering::AcqRel);
    while awaited.load(Ordering::Acquire) > 0 {
        hint::spin_loop();
    }
    let (began, before) = (Instant::now(), processor_time());
    pre_fault_all(&mut vcpu, GPA + pages.start * PAGE_SIZE, pages.end - pages.start);
    Share { began, ended: Instant::now(), processor: processor_time() - before }
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
    let awaited = AtomicU32::new(vcpus);
    let shares: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..vcpus)
            .map(|id| {
                let (vm, awaited) = (&vm, &awaited);
                let first = u64::from(id) * share;
                scope.spawn(move || part(vm, id, first..first + share, awaited))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker maps to its end")).collect()
    });
    let began = shares.iter().map(|share| share.began).min();
    let ended = shares.iter().map(|share| share.ended).max();
    let elapsed = began.zip(ended).map_or(Duration::ZERO, |(began, ended)| ended - began);
    let (elapsed, processor) =
        (elapsed.as_secs_f64() * 1e9, shares.iter().map(|share| share.processor).sum::<f64>());
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
