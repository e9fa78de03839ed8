//! The engine and the launch of TDs against a KVM that does what it likes.
//!
//! Every run ends within its bound, whatever is done to it; every report accounts for every byte, once a stage; and no thread or
//! descriptor is left. Cases are made up from their seeds. `PREMAP_HOSTILE_SEED=N` tries one case alone, and
//! `PREMAP_HOSTILE_RUNS=N` sets how many are tried.
#![cfg(feature = "td")]
// UNSAFETY: implements a trait with unsafe methods; none is called.
#![expect(unsafe_code, reason = "the trait's methods are unsafe to call")]

mod case;
mod kvm;
mod memory;
mod random;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm::PANIC;
use memory::Memory;

const RUNS: u64 = 100_000;
/// Half of a case is waiting, for patience to end or for a signal.
const DRIVERS: usize = 6;
/// A run takes some milliseconds at most; a machine that is busy with something else takes longer.
const BOUND: Duration = Duration::from_secs(60);

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// Threads and descriptors of this process.
fn open() -> [usize; 2] {
    ["task", "fd"]
        .map(|what| std::fs::read_dir(format!("/proc/self/{what}")).expect("/proc is there").count())
}

/// Tries the cases from `first` on; gives the seeds of those that failed.
fn try_all(first: u64, count: u64, memory: &Memory) -> Vec<u64> {
    let next = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let failed = Mutex::new(Vec::new());
    let under_way: Vec<Mutex<Option<(u64, Instant)>>> = (0..DRIVERS).map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        // A run that does not end keeps its driver, and with it the test: it is told from outside.
        let bound = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::park_timeout(Duration::from_secs(1));
                for case in &under_way {
                    if let Some((seed, _)) = case
                        .lock()
                        .expect("no panic under the lock")
                        .filter(|(_, begin)| begin.elapsed() > BOUND)
                    {
                        eprintln!("a case did not end in {BOUND:?}: PREMAP_HOSTILE_SEED={seed}");
                        std::process::abort();
                    }
                }
            }
        });
        let drive = |slot: &Mutex<Option<(u64, Instant)>>| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                let seed = first.wrapping_add(index);
                *slot.lock().expect("no panic under the lock") = Some((seed, Instant::now()));
                if catch_unwind(AssertUnwindSafe(|| case::check(seed, memory))).is_err() {
                    failed.lock().expect("no panic under the lock").push(seed);
                }
                *slot.lock().expect("no panic under the lock") = None;
            }
        };
        let drivers: Vec<_> = under_way.iter().map(|slot| scope.spawn(move || drive(slot))).collect();
        drivers.into_iter().for_each(|driver| driver.join().expect("a driver catches what panics"));
        done.store(true, Ordering::Relaxed);
        bound.thread().unpark();
        bound.join().expect("it only looks");
    });
    failed.into_inner().expect("no panic under the lock")
}

#[test]
fn whatever_kvm_does_every_run_ends_every_byte_is_accounted_for_and_nothing_is_left() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref() != Some(&PANIC) {
            told(panic);
        }
    }));
    let single = variable("PREMAP_HOSTILE_SEED");
    let count = single.map_or_else(|| variable("PREMAP_HOSTILE_RUNS").unwrap_or(RUNS), |_| 1);
    // Another set of cases each time.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time");
    let first = single.unwrap_or(u64::from(now.subsec_nanos()) << 32 | now.as_secs() & 0xffff_ffff);
    println!("{count} cases from PREMAP_HOSTILE_SEED={first} on");
    let memory = Memory::new();
    let before = open();
    let failed = try_all(first, count, &memory);
    assert!(failed.is_empty(), "failed: PREMAP_HOSTILE_SEED={failed:?}");
    // A thread that was joined may be listed for a moment longer.
    let begin = Instant::now();
    while open() != before && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(open(), before, "threads and descriptors are left");
}
