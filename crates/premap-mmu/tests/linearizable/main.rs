//! Four threads at once: what each is told can be put in one order that a plain model agrees with.
//!
//! `pages` has single-page operations on a few pages, `block` every operation of the crate on one block of 2 MiB; `order`
//! searches the order.

mod block;
mod order;
mod pages;

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use order::Event;

const THREADS: usize = 4;

/// Random numbers, the same for the same seed.
struct Random(u64);

impl Random {
    fn new(round: u64, thread: usize) -> Self {
        let mut own = Self((round + 1) * 0x9e37_79b9 + thread as u64 * 0x1234_5677 + 1);
        own.next();
        own
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of the first so many numbers.
    fn below(&mut self, count: u64) -> u64 {
        (self.next() >> 20) % count
    }
}

/// Counts up at the beginning and the end of each operation.
#[derive(Default)]
struct Clock(AtomicU64);

impl Clock {
    /// Runs an operation between two ticks.
    fn time<O, T>(&self, op: O, run: impl FnOnce(&O) -> T) -> Event<O, T> {
        let began = self.0.fetch_add(1, Ordering::SeqCst);
        let told = run(&op);
        let ended = self.0.fetch_add(1, Ordering::SeqCst);
        Event { op, told, began, ended }
    }
}

/// Lets four threads do their steps at once, and gives what each did.
fn at_once<E: Send>(round: u64, steps: usize, step: impl Fn(usize, &mut Random) -> E + Sync) -> Vec<Vec<E>> {
    let barrier = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        let start = |thread: usize| {
            let (barrier, step) = (&barrier, &step);
            scope.spawn(move || {
                let mut random = Random::new(round, thread);
                barrier.wait();
                (0..steps).map(|_| step(thread, &mut random)).collect::<Vec<_>>()
            })
        };
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}
