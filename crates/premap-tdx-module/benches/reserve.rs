//! How fast a TD's memory is given to it, on one thread and on two.
//!
//! `reserve`: SEPT.ADD and PAGE.AUG of 1 GiB in pages of 4 KiB, each thread a part of its own. Every round is a new machine, so
//! first touches are in it. What counts is the longest thread's processor time, so that others who run on the machine do
//! not count, while what threads cost each other does; the wall clock's is beside it. The median counts, and the spread is
//! (max - min) / median. `--rounds N` sets how often, `--json` writes lines for a program.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use premap_tdx_module::{
    Config, Gpa, Hkid, Hpa, HpaRange, Level, Module, Package, PageInfo, TDCS_PAGES, TdParams,
};
use rustix::time::{ClockId, clock_gettime};

/// What is given.
const BYTES: u64 = 1 << 30;
const LARGE: u64 = 2 << 20;
/// Where that memory lies; below are the TD's pages and its tables.
const MEMORY: u64 = 2 << 30;
const TABLES: u64 = 1 << 30;

struct Machine {
    module: Module,
    tdr: Hpa,
}

fn machine() -> Machine {
    let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).expect("a range");
    let mut config = Config::new(range(TABLES, MEMORY + BYTES - TABLES));
    config.memory.push(range(0, 1 << 20));
    let module = Module::new(&config).expect("a machine");
    let mut next = (TABLES..).step_by(4096).map(Hpa::new);
    let mut page = || next.next().expect("without end");
    let tdr = page();
    module.mng_create(tdr, Hkid(40)).expect("a free HKID");
    module.mng_key_config(tdr, Package(0)).expect("one package");
    (0..TDCS_PAGES).for_each(|_| module.mng_addcx(page(), tdr).expect("a free page"));
    module.host_write(Hpa::new(0), &TdParams::default().to_bytes()).expect("memory");
    module.mng_init(tdr, Hpa::new(0)).expect("parameters");
    for level in [Level::PML4, Level::PDPT] {
        module.mem_sept_add(PageInfo::new(Gpa::new(0), level), tdr, page()).expect("no table yet");
    }
    Machine { module, tdr }
}

/// Gives a part of the memory: a table every 2 MiB, and the pages in it.
fn reserve(Machine { module, tdr }: &Machine, part: std::ops::Range<u64>) -> Duration {
    let begin = processor_time();
    for table in part.step_by(usize::try_from(LARGE).expect("small")) {
        let frame = Hpa::new(TABLES + (1 << 20) + table / 512);
        module.mem_sept_add(PageInfo::new(Gpa::new(table), Level::PD), *tdr, frame).expect("no table yet");
        for gpa in (table..table + LARGE).step_by(4096) {
            module
                .mem_page_aug(PageInfo::page(Gpa::new(gpa)), *tdr, Hpa::new(MEMORY + gpa))
                .expect("a free entry");
        }
    }
    processor_time() - begin
}

fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("the clock starts at 0")
}

/// One round: seconds of the longest thread's processor time, and of the clock on the wall.
fn round(threads: u64) -> (f64, f64) {
    let machine = machine();
    let start = Barrier::new(usize::try_from(threads).expect("few") + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let part = BYTES / threads * thread..BYTES / threads * (thread + 1);
                let (machine, start) = (&machine, &start);
                scope.spawn(move || {
                    start.wait();
                    reserve(machine, part)
                })
            })
            .collect();
        start.wait();
        let begin = Instant::now();
        let times = workers.into_iter().map(|worker| worker.join().expect("no panic"));
        let longest = times.max().expect("a thread").as_secs_f64();
        (longest, begin.elapsed().as_secs_f64())
    })
}

fn median(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    (median, (times[times.len() - 1] - times[0]) / median)
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let rounds = std::env::args().skip_while(|argument| argument != "--rounds").nth(1);
    let rounds: usize = rounds.map_or(11, |rounds| rounds.parse().expect("--rounds takes a number"));
    let mut times = [1, 2].map(|threads| (threads, Vec::new(), Vec::new()));
    for turn in 0..=rounds {
        for (threads, processor, wall) in &mut times {
            let (longest, elapsed) = round(*threads);
            if turn > 0 {
                processor.push(longest);
                wall.push(elapsed);
            }
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a quarter of a million")]
    let pages = (BYTES / 4096) as f64;
    let lines: Vec<_> = times
        .iter_mut()
        .map(|(threads, processor, wall)| {
            let ((seconds, spread), (wall, _)) = (median(processor), median(wall));
            (*threads, pages / seconds, spread, pages / wall)
        })
        .collect();
    if json {
        let line = |&(threads, value, spread, wall): &(u64, f64, f64, f64)| {
            serde_json::json!({
                "bench": "reserve", "subject": "premap", "threads": threads,
                "value": value, "unit": "pages/s", "spread": spread, "wall": wall,
            })
        };
        let lines: Vec<_> = lines.iter().map(line).collect();
        println!("{}", serde_json::to_string_pretty(&lines).expect("lines are plain"));
        return;
    }
    for (threads, value, spread, wall) in &lines {
        println!(
            "reserve  {threads} threads {:8.3} million pages/s  spread {spread:.2}  wall {:.3}",
            value / 1e6,
            wall / 1e6
        );
    }
    if let [(_, one, _, wall_one), (_, two, _, wall_two)] = lines.as_slice() {
        println!("two threads: {:.2} times one (wall clock: {:.2})", two / one, wall_two / wall_one);
    }
}
