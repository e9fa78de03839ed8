//! What the subjects share: frames, addresses, clocks, and the collection of figures.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use premap_mmu::Arena;
use serde_json::json;

/// The pages of each bench.
pub(crate) const PAGES: u64 = if cfg!(debug_assertions) { 10_000 } else { 1_000_000 };
/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// The pages that random order is drawn from: 16 GiB.
const SPREAD: u64 = 16 << 30 >> 12;
/// Frames for the tables of the widest bench, with room to spare.
const FRAMES: usize = 10_000;

/// One thing to measure, with a name to choose it by: notes figures in the sink.
pub(crate) type Run = (&'static str, fn(&mut World, &mut Sink));

/// What the subjects work with.
pub(crate) struct World {
    /// Frames for tables, touched before.
    pub(crate) arena: Arena,
    /// Distinct pages of 16 GiB in random order.
    pub(crate) random: Vec<u64>,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut pages: Vec<u64> = (0..SPREAD).collect();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for at in 0..PAGES {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let other = at + state % (SPREAD - at);
            pages.swap(usize::try_from(at).expect("64 bits"), usize::try_from(other).expect("64 bits"));
        }
        pages.truncate(usize::try_from(PAGES).expect("64 bits"));
        Self { arena: Arena::new(FRAMES).expect("40 MiB for tables"), random: pages }
    }

    /// Waits, for at most two seconds, until nobody else runs: other work on the machine makes figures worthless.
    pub(crate) fn wait_until_idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        while !cfg!(debug_assertions) && running().is_some_and(|tasks| tasks > 1) && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// How many tasks run or want to, ours included.
fn running() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("procs_running ")?.trim().parse().ok())
}

/// The processor time a piece of work takes, in nanoseconds a page: what others do on the machine meanwhile is left out.
pub(crate) fn time<R>(work: impl FnOnce() -> R) -> (f64, R) {
    let start = processor_time();
    let result = work();
    (a_page(processor_time() - start), result)
}

/// A duration as nanoseconds a page.
#[expect(clippy::cast_precision_loss, reason = "figures need three digits")]
pub(crate) fn a_page(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / PAGES as f64
}

/// What this thread has used of a processor so far.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).expect("processor time is never negative")
}

/// The figures of all rounds.
#[derive(Default)]
pub(crate) struct Sink {
    figures: BTreeMap<(&'static str, &'static str, usize), Vec<f64>>,
}

impl Sink {
    /// Notes a figure of one round.
    pub(crate) fn note(&mut self, bench: &'static str, subject: &'static str, threads: usize, figure: f64) {
        self.figures.entry((bench, subject, threads)).or_default().push(figure);
    }

    /// The best figure of all rounds.
    pub(crate) fn minimum(&self, bench: &str, subject: &str, threads: usize) -> Option<f64> {
        let found = self.figures.iter().find(|(key, _)| **key == (bench, subject, threads));
        found.map(|(_, figures)| minimum(figures))
    }

    /// A row for each figure.
    pub(crate) fn rows(&self) -> Vec<serde_json::Value> {
        let row = |(&(bench, subject, threads), figures): (&(&str, &str, usize), &Vec<f64>)| {
            let least = minimum(figures);
            self::row(bench, subject, threads, least, "ns/page", median(figures) - least)
        };
        self.figures.iter().map(row).collect()
    }

    /// Every other subject's figure divided by premap's, on one thread.
    pub(crate) fn ratios(&self) -> Vec<(String, String, usize, f64)> {
        let others = self.figures.iter().filter(|((_, subject, _), _)| *subject != "premap");
        others
            .filter_map(|(&(bench, subject, threads), figures)| {
                let ours = self.minimum(bench, "premap", threads)?;
                let ratio = minimum(figures) / ours;
                Some((bench.to_owned(), format!("{subject} / premap"), threads, ratio))
            })
            .collect()
    }

    /// Prints a table for people.
    pub(crate) fn print(&self) {
        println!("{:<24} {:<40} {:>7} {:>9} {:>9}", "bench", "subject", "threads", "min ns", "median");
        for ((bench, subject, threads), figures) in &self.figures {
            let (least, middle) = (minimum(figures), median(figures));
            println!("{bench:<24} {subject:<40} {threads:>7} {least:>9.3} {middle:>9.3}");
        }
    }
}

/// One object of the JSON output.
pub(crate) fn row(
    bench: &str,
    subject: &str,
    threads: usize,
    value: f64,
    unit: &str,
    spread: f64,
) -> serde_json::Value {
    json!({
        "bench": bench, "subject": subject, "threads": threads,
        "value": value, "unit": unit, "spread": spread,
    })
}

fn minimum(figures: &[f64]) -> f64 {
    figures.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
