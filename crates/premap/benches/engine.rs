//! The engine against bare loops of its system calls, in one run.
//!
//! | bench | what is done | unit |
//! |---|---|---|
//! | `host_stage` | fresh anonymous memory of 4 KiB pages is made present, on 1 and 2 threads | ns a page |
//! | `chunk` | memory that is present already goes through both stages in chunks of 2 MiB | us a chunk |
//! | `small_run` | the same with 4 MiB in a run of its own | us a run |
//! | `overshoot` | fresh memory in one chunk of 1 GiB, with a deadline of 10 ms: how much later the run is over | ms |
//!
//! The second stage of `chunk` and `small_run` is a vCPU that does nothing, so that what premap takes longer than
//! `madvise_alone` is the engine's own. `overshoot` is compared with a sleep until the deadline: the machine's own part of it.
//! Subjects take turns piece by piece, a piece of memory being a sample, so that what else runs on the machine meets both
//! alike; the median counts, and the spread is (max - min) / median. `--mib N` sets the memory, `--rounds N`, from 2 on, how
//! often all of it is gone through.
// UNSAFETY: mmap, madvise and munmap of memory that nothing refers to.
#![expect(unsafe_code, reason = "maps memory to populate it")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bench_report::{Line, flag, json, wants_json};
use premap::{Backing, Budget, Engine, Gpa, GpaRange, Hva, Plan, Region, Stages, Touch};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Stats, Vcpu};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const CHUNK: usize = 16 << 20;
const SMALL_CHUNK: usize = 2 << 20;
const SMALL_RUN: usize = 4 << 20;
/// Large, so that a run's beginning and end weigh little.
const PIECE: usize = 512 << 20;
/// More than can be populated before the deadline.
const LATE: usize = 1 << 30;
const DEADLINE: Duration = Duration::from_millis(10);
/// Small, so that most samples are not disturbed by another program's turn on the processor.
const OVERHEAD: usize = 64 << 20;
const PAGE: usize = 4096;

const OVERSHOOT: &str = "overshoot";

/// A vCPU whose second stage costs nothing.
struct Null;

impl Vcpu for Null {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        (range.gpa, range.size) = (range.gpa + range.size, 0);
        Ok(())
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
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

    /// Its pieces of at most so many bytes.
    fn pieces(&self, bytes: usize) -> impl Iterator<Item = Piece<'_>> {
        (0..self.len).step_by(bytes).map(move |offset| Piece {
            memory: self,
            offset,
            len: bytes.min(self.len - offset),
        })
    }
}

/// A part of the memory.
struct Piece<'a> {
    memory: &'a Memory,
    offset: usize,
    len: usize,
}

impl Piece<'_> {
    fn plan(&self, chunk: usize) -> Plan {
        let range = GpaRange::new(Gpa::new(self.offset as u64), self.len as u64);
        let host = Hva::new((self.memory.base.expose_provenance() + self.offset) as u64);
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

fn host_stage(piece: &Piece<'_>, threads: usize) -> Duration {
    let plan = piece.plan(CHUNK);
    let begin = Instant::now();
    let none: &mut [Null] = &mut [];
    let report =
        Engine::new().stages(Stages::Host).host_threads(threads).run(&plan, none).expect("it begins");
    let elapsed = begin.elapsed();
    assert_eq!(report.host.mapped, piece.len as u64);
    elapsed
}

fn both_stages(piece: &Piece<'_>) -> Duration {
    let plan = piece.plan(SMALL_CHUNK);
    let begin = Instant::now();
    let report = Engine::new().run(&plan, &mut [Null]).expect("it begins");
    let elapsed = begin.elapsed();
    assert!(report.is_complete());
    elapsed
}

fn bare(piece: &Piece<'_>, chunk: usize, threads: usize) -> Duration {
    let begin = Instant::now();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let offset = next.fetch_add(chunk, Ordering::Relaxed);
                    if offset >= piece.len {
                        break;
                    }
                    piece.memory.populate(piece.offset + offset, chunk.min(piece.len - offset));
                }
            });
        }
    });
    begin.elapsed()
}

/// Samples of both subjects, in seconds a unit.
#[derive(Default)]
struct Duel([Vec<f64>; 2]);

impl Duel {
    /// Has the subject whose turn it is go through a piece of so many units.
    fn piece(
        &mut self,
        turn: usize,
        units: usize,
        ours: impl FnOnce() -> Duration,
        floor: impl FnOnce() -> Duration,
    ) {
        let elapsed = if turn.is_multiple_of(2) { ours() } else { floor() };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 pages")]
        self.0[turn % 2].push(elapsed.as_secs_f64() / units as f64);
    }

    fn lines(self, bench: &'static str, threads: usize, (unit, scale): (&'static str, f64)) -> [Line; 2] {
        let floor = if bench == OVERSHOOT { "sleep_alone" } else { "madvise_alone" };
        let mut subjects = ["premap", floor].into_iter();
        self.0.map(|seconds| {
            let subject = subjects.next().expect("two subjects");
            let samples = seconds.into_iter().map(|seconds| seconds * scale).collect();
            Line::new((bench, subject), threads, unit, samples)
        })
    }
}

fn host_stages(len: usize, rounds: usize, threads: usize) -> [Line; 2] {
    let mut duel = Duel::default();
    for round in 0..rounds {
        let memory = Memory::new(len);
        for (index, piece) in memory.pieces(PIECE).enumerate() {
            let (ours, floor) = (|| host_stage(&piece, threads), || bare(&piece, CHUNK, threads));
            duel.piece(round + index, piece.len / PAGE, ours, floor);
        }
    }
    duel.lines("host_stage", threads, ("ns/page", 1e9))
}

/// Both stages on memory that is present, a run a piece.
fn overhead(bench: &'static str, unit: &'static str, len: usize, runs: usize, units: usize) -> [Line; 2] {
    let memory = Memory::new(len);
    memory.populate(0, len);
    let mut duel = Duel::default();
    for (turn, piece) in (0..2 * runs).flat_map(|_| memory.pieces(len)).enumerate() {
        duel.piece(turn, units, || both_stages(&piece), || bare(&piece, SMALL_CHUNK, 1));
    }
    duel.lines(bench, 1, (unit, 1e6))
}

/// How long after its deadline a run is over that can't be done by then, and a sleep until then.
fn overshoot(runs: usize) -> [Line; 2] {
    let mut duel = Duel::default();
    for turn in 0..2 * runs {
        let late = |wait: &dyn Fn(Instant)| {
            let deadline = Instant::now() + DEADLINE;
            wait(deadline);
            deadline.elapsed()
        };
        let run = || {
            let memory = Memory::new(LATE);
            let plan = Piece { memory: &memory, offset: 0, len: LATE }.plan(LATE);
            late(&|deadline| {
                let budget = Budget { deadline: Some(deadline), ..Budget::default() };
                let report = Engine::new().budget(budget).run(&plan, &mut [Null]).expect("it begins");
                assert!(report.host.abandoned > 0, "the deadline was met: {report:?}");
            })
        };
        duel.piece(turn, 1, run, || late(&|deadline| thread::sleep(deadline - Instant::now())));
    }
    duel.lines(OVERSHOOT, 1, ("ms", 1e3))
}

fn main() {
    let (len, rounds) = (flag("--mib", 4096) << 20, flag("--rounds", 4));
    let mut lines = Vec::new();
    lines.extend(host_stages(len, rounds, 1));
    lines.extend(host_stages(len, rounds, 2));
    lines.extend(overhead("chunk", "us/chunk", OVERHEAD, 50 * rounds, OVERHEAD / SMALL_CHUNK));
    lines.extend(overhead("small_run", "us/run", SMALL_RUN, 100 * rounds, 1));
    lines.extend(overshoot(10 * rounds));
    if wants_json() {
        println!("{}", json(&lines).expect("lines are plain"));
        return;
    }
    for pair in lines.chunks_exact(2) {
        let [ours, floor] = pair else { continue };
        println!("{ours}\n{floor}");
        if ours.bench == OVERSHOOT {
            println!("{:10} {:.1} {} over it\n", "", ours.value - floor.value, ours.unit);
            continue;
        }
        let (ratio, over) = (floor.value / ours.value, ours.value - floor.value);
        println!("{:10} {ratio:.3} times the rate of the bare loop, {over:.1} {} over it\n", "", ours.unit);
    }
}
