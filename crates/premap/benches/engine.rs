//! The engine's host stage against a bare loop of the same system call, in one run.
//!
//! `host_stage`: fresh anonymous memory of 4 KiB pages, 1 and 2 threads, nanoseconds a page. `chunk`: what a chunk costs
//! over the call itself, measured on memory that is present already, microseconds. Subjects take turns, so that a machine
//! whose speed drifts treats both alike; the median counts, and the spread is (max - min) / median.
// UNSAFETY: mmap, madvise and munmap of memory that nothing refers to.
#![expect(unsafe_code, reason = "maps memory to populate it")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use premap::{Backing, Engine, Gpa, GpaRange, Hva, Plan, Region, Stages, Touch};
use premap_kvm::linux::Vcpu;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::os::fd::OwnedFd;

const CHUNK: usize = 16 << 20;
const SMALL_CHUNK: usize = 2 << 20;
const PAGE: usize = 4096;
const ROUNDS: usize = 5;

#[derive(serde::Serialize)]
struct Line {
    bench: &'static str,
    subject: &'static str,
    threads: usize,
    value: f64,
    unit: &'static str,
    spread: f64,
}

/// Anonymous memory of 4 KiB pages, unmapped on drop.
struct Memory {
    base: *mut c_void,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and only its presence is changed, never its content.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice; the advice changes how it will be backed.
        let base = unsafe {
            let base = mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .expect("the memory can be had");
            madvise(base, len, Advice::LinuxNoHugepage).expect("huge pages can be forgone");
            base
        };
        Self { base, len }
    }

    fn populate(&self, offset: usize, len: usize) {
        // SAFETY: within the mapping; populating changes no content.
        unsafe { madvise(self.base.byte_add(offset), len, Advice::LinuxPopulateWrite) }
            .expect("populating works");
    }

    fn plan(&self, chunk: usize) -> Plan {
        let range = GpaRange::new(Gpa::new(0), self.len as u64);
        let host = Hva::new(self.base.expose_provenance() as u64);
        let region = Region { range, host, backing: Backing::Anonymous, touch: Touch::Write };
        Plan::new([region]).and_then(|plan| plan.with_chunk(chunk as u64)).expect("the memory is aligned")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it.
        unsafe { munmap(self.base, self.len) }.expect("an own mapping can be unmapped");
    }
}

fn engine(memory: &Memory, chunk: usize, threads: usize) -> f64 {
    let plan = memory.plan(chunk);
    let begin = Instant::now();
    let none: &mut [Vcpu<OwnedFd>] = &mut [];
    let report =
        Engine::new().stages(Stages::Host).host_threads(threads).run(&plan, none).expect("it begins");
    let elapsed = begin.elapsed();
    assert_eq!(report.host.mapped, memory.len as u64);
    elapsed.as_secs_f64()
}

fn bare(memory: &Memory, chunk: usize, threads: usize) -> f64 {
    let begin = Instant::now();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let offset = next.fetch_add(chunk, Ordering::Relaxed);
                    if offset >= memory.len {
                        break;
                    }
                    memory.populate(offset, chunk);
                }
            });
        }
    });
    begin.elapsed().as_secs_f64()
}

/// Runs both subjects in turn and gives their lines.
fn duel(
    bench: &'static str,
    threads: usize,
    unit: &'static str,
    scale: f64,
    mut round: impl FnMut(bool) -> f64,
) -> [Line; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..ROUNDS {
        for subject in [turn % 2, 1 - turn % 2] {
            times[subject].push(round(subject == 0) * scale);
        }
    }
    let mut subjects = ["premap", "madvise_alone"].into_iter();
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        let value = times[ROUNDS / 2];
        let spread = (times[ROUNDS - 1] - times[0]) / value;
        let subject = subjects.next().expect("two subjects");
        Line { bench, subject, threads, value, unit, spread }
    })
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let mib = std::env::args().skip_while(|argument| argument != "--mib").nth(1);
    let mib: usize = mib.map_or(4096, |mib| mib.parse().expect("--mib takes a number"));
    let len = mib << 20;
    let mut lines = Vec::new();
    for threads in [1, 2] {
        let scale = 1e9 / (len / PAGE) as f64;
        lines.extend(duel("host_stage", threads, "ns/page", scale, |ours| {
            let memory = Memory::new(len);
            if ours { engine(&memory, CHUNK, threads) } else { bare(&memory, CHUNK, threads) }
        }));
    }
    let memory = Memory::new(len / 2);
    memory.populate(0, memory.len);
    let scale = 1e6 / (memory.len / SMALL_CHUNK) as f64;
    lines.extend(duel("chunk", 1, "us/chunk", scale, |ours| {
        if ours { engine(&memory, SMALL_CHUNK, 1) } else { bare(&memory, SMALL_CHUNK, 1) }
    }));
    if json {
        println!("{}", serde_json::to_string_pretty(&lines).expect("lines are plain"));
        return;
    }
    for pair in lines.chunks_exact(2) {
        for Line { bench, subject, threads, value, unit, spread } in pair {
            println!("{bench:10} {threads} threads  {subject:14} {value:10.1} {unit}  spread {spread:.2}");
        }
        println!("{:10} {:>32.3} times the rate of the bare loop\n", "", pair[1].value / pair[0].value);
    }
}
