//! How fast a TD's memory is reserved ahead of its launch: the Secure-EPT built and a page set aside for each of 4 GiB, by
//! one vCPU and by two.
//!
//! Each round makes a fresh TD for one vCPU and another for two, in turn, so that drift of the machine hits both alike; only
//! the reserving is timed. The median counts, and the spread is (max - min) / median. `--rounds N` sets how often.

use std::time::Instant;

use bench_report::{Line, flag, json, wants_json};
use premap::{Engine, Gpa, GpaRange, Plan, Region, Stages};
use premap_guest::TdMachine;
use premap_softkvm::Profile;

const BYTES: u64 = if cfg!(debug_assertions) { 64 << 20 } else { 16 << 30 };
const THREADS: [usize; 2] = [1, 2];

/// Nanoseconds a page, with so many vCPUs.
fn reserve(threads: usize) -> f64 {
    let memory = GpaRange::new(Gpa::new(0), BYTES);
    let vcpus = u32::try_from(threads).expect("one or two");
    let mut machine = TdMachine::new(Profile::PROPOSAL, vcpus, &[memory]).expect("a TD can be made");
    let plan = Plan::new([Region::private(memory)]).expect("one range");
    let (vm, vcpus) = machine.lend();
    let start = Instant::now();
    let report = Engine::new().vm(vm).stages(Stages::Second).run(&plan, vcpus).expect("it begins");
    let elapsed = start.elapsed();
    assert_eq!(report.second.mapped, BYTES, "{:?}", report.unmapped);
    #[expect(clippy::cast_precision_loss, reason = "figures need three digits")]
    let ns = elapsed.as_nanos() as f64 / memory.pages() as f64;
    ns
}

fn main() {
    let rounds = flag("--rounds", 9);
    let mut samples = THREADS.map(|_| Vec::new());
    for _ in 0..rounds {
        for (threads, samples) in THREADS.iter().zip(&mut samples) {
            samples.push(reserve(*threads));
        }
    }
    let mut lines = Vec::new();
    for (threads, samples) in THREADS.into_iter().zip(samples) {
        lines.push(Line::new(("reserve", "premap"), threads, "ns/page", samples));
    }
    if wants_json() {
        println!("{}", json(&lines).expect("lines are plain"));
        return;
    }
    lines.iter().for_each(|line| println!("{line}"));
    println!("two vCPUs reserve {:.2} times as fast as one", lines[0].value / lines[1].value);
}
