//! One run: its threads and who does what.
//!
//! ```text
//!   premap-vcpu-N   maps what is ready at the second stage, through one lent vCPU; makes the next chunk present
//!                   while nothing is ready
//!   premap-host-N   only makes chunks present, where the caller wants more threads than vCPUs
//!   the caller      watches: interrupts calls that stall or outlive the run, and reports progress
//! ```
//!
//! So there are as many threads at work as the caller lends vCPUs, and with two or more the host stage of the next chunks
//! overlaps the second stage of this one. While a vCPU is lent (`&mut`) it can't run the guest, and nobody waits for its
//! mutex.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, ScopedJoinHandle};
use std::time::{Duration, Instant};

use premap_kvm::Vcpu;

use crate::clock::Clock;
use crate::control::Control;
use crate::engine::{Error, Stages};
use crate::host_stage::HostStage;
use crate::interrupt::Interrupt;
use crate::pipeline::{Job, Pipeline};
use crate::plan::Chunk;
use crate::report::{Fate, Reason, Report, Stage, Unsupported};
use crate::second_stage::{SecondStage, Usable};
use crate::tally::{Numbered, Tally};
use crate::watchdog::Worker;

/// The shortest time between two calls of a progress callback.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// How often the watchdog looks.
const WATCH_EVERY: Duration = Duration::from_millis(10);
/// How many chunks the host stage may be ahead, for each vCPU.
const CHUNKS_AHEAD: usize = 4;

/// What the engine was told, settled for one run.
pub(crate) struct Terms<'a, I> {
    pub(crate) stages: Stages,
    pub(crate) patience: Duration,
    pub(crate) control: &'a Control,
    pub(crate) interrupt: Option<Interrupt>,
    pub(crate) unsupported: Unsupported,
    pub(crate) chunks: I,
    pub(crate) bytes: Option<u64>,
    pub(crate) host_threads: usize,
    pub(crate) vcpus: usize,
}

/// What the threads of one run share.
pub(crate) struct Run<'a, I> {
    stages: Stages,
    patience: Duration,
    control: &'a Control,
    interrupt: Option<Interrupt>,
    unsupported: Unsupported,
    host_threads: usize,
    clock: Clock,
    begin: Instant,
    pipeline: Pipeline<I>,
    watched: Vec<Worker>,
    /// vCPU workers that have not given up.
    usable: AtomicUsize,
    /// Bytes gone through each stage, for progress.
    through: [AtomicU64; 2],
    /// Threads that have not ended.
    at_work: Mutex<usize>,
    all_done: Condvar,
}

impl<'a, I: Iterator<Item = Chunk> + Send> Run<'a, I> {
    pub(crate) fn new(terms: Terms<'a, I>) -> Self {
        let Terms { stages, patience, control, interrupt, unsupported, chunks, bytes, host_threads, vcpus } =
            terms;
        let room = host_threads + vcpus.max(1) * CHUNKS_AHEAD;
        Self {
            stages,
            patience,
            control,
            interrupt,
            unsupported,
            host_threads,
            clock: Clock::new(),
            begin: Instant::now(),
            pipeline: Pipeline::new(chunks, bytes, room),
            watched: std::iter::repeat_with(Worker::default).take(vcpus).collect(),
            usable: AtomicUsize::new(vcpus),
            through: [AtomicU64::new(0), AtomicU64::new(0)],
            at_work: Mutex::new(0),
            all_done: Condvar::new(),
        }
    }

    /// Does the work and gives the account of it; `progress` is called on this thread.
    pub(crate) fn work<V: Vcpu + Send>(
        self,
        vcpus: &mut [V],
        progress: impl FnMut([u64; 2], Duration),
    ) -> Result<Report, Error> {
        let mut tally = std::thread::scope(|scope| {
            let mut threads: Vec<ScopedJoinHandle<'_, Tally>> = Vec::new();
            let run = &self;
            let hosts = (0..run.host_threads).map(|number| {
                let shift = run.begin_shift();
                (format!("premap-host-{number}"), Box::new(move || run.host_worker(shift)) as Body<'_>)
            });
            let seconds = run.watched.iter().zip(vcpus).enumerate().map(|(number, (worker, vcpu))| {
                let shift = run.begin_shift();
                (
                    format!("premap-vcpu-{number}"),
                    Box::new(move || run.vcpu_worker(worker, vcpu, shift)) as Body<'_>,
                )
            });
            for (name, job) in hosts.chain(seconds) {
                match Builder::new().name(name).spawn_scoped(scope, job) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        run.control.declare_dead();
                        run.pipeline.wake();
                        return Err(Error::Spawn(error));
                    }
                }
            }
            run.watch(progress);
            let mut tally = Tally::default();
            for thread in threads {
                match thread.join() {
                    Ok(theirs) => tally.merge(theirs),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(tally)
        })?;
        let wall = self.begin.elapsed();
        let times = [Stage::Host, Stage::Second].map(|stage| self.clock.read(stage));
        self.pipeline.lose_rest(self.control, self.stages, &mut tally);
        let mut report = Report { wall_ns: nanos(wall), ..Report::default() };
        tally.write(&mut report);
        for (stage, (share, busy)) in [&mut report.host, &mut report.second].into_iter().zip(times) {
            (stage.ns, stage.busy_ns) = (nanos(share), nanos(busy));
        }
        Ok(report)
    }

    fn host_worker(&self, _shift: Shift<'_, 'a, I>) -> Tally {
        let mut tally = Tally::default();
        self.populate_rest(&mut tally);
        tally
    }

    /// Takes chunks through the host stage until none is left.
    fn populate_rest(&self, tally: &mut Tally) {
        while let Some(numbered) = self.pipeline.take(self.control) {
            self.populate(numbered, tally);
        }
    }

    /// Takes a chunk through the host stage, if that was asked for, and hands it on.
    fn populate(&self, numbered: Numbered, tally: &mut Tally) {
        let Numbered { place, chunk } = numbered;
        let mut ready = Vec::new();
        if self.stages.include(Stage::Host) {
            let stage = HostStage { control: self.control, clock: &self.clock, patience: self.patience };
            let populated = stage.run(numbered, tally);
            if self.stages.include(Stage::Second) {
                for (range, reason) in populated.absent {
                    // What the run's end cut off is worth another try at both stages; what the host refused is not.
                    let why = if reason.fate() == Fate::Failed { Reason::HostStageFailed } else { reason };
                    tally.lost(place, Stage::Second, range, why);
                    self.pass(Stage::Second, range.bytes());
                }
                ready = populated.present;
            }
        } else {
            tally.lost(place, Stage::Host, chunk.range, Reason::NotAsked);
            ready.push(chunk.range);
        }
        if !self.stages.include(Stage::Second) {
            tally.lost(place, Stage::Second, chunk.range, Reason::NotAsked);
        }
        self.pass(Stage::Host, chunk.range.bytes());
        self.pipeline.put(place, ready);
    }

    fn vcpu_worker<V: Vcpu>(&self, worker: &Worker, vcpu: &mut V, _shift: Shift<'_, 'a, I>) -> Tally {
        let mut tally = Tally::default();
        let mut stage = SecondStage {
            vcpu,
            control: self.control,
            clock: &self.clock,
            watched: worker.watch(self.begin, self.interrupt),
            patience: self.patience,
            unsupported: self.unsupported,
            stalled: false,
        };
        let mut usable = Usable::Yes;
        while let Some(job) = self.pipeline.next(self.control) {
            let was = usable;
            match job {
                Job::Host(numbered) => self.populate(numbered, &mut tally),
                Job::Second(place, ranges) => {
                    for range in ranges {
                        match usable {
                            Usable::Yes => usable = stage.run(place, range, &mut tally),
                            Usable::No => tally.lost(place, Stage::Second, range, Reason::NoProgress),
                        }
                        self.pass(Stage::Second, range.bytes());
                    }
                }
            }
            // A vCPU that has given up leaves the second stage to the others; the last one stays to account for it.
            if was != usable && self.usable.fetch_sub(1, Ordering::Relaxed) > 1 {
                self.populate_rest(&mut tally);
                break;
            }
        }
        tally
    }

    fn pass(&self, stage: Stage, bytes: u64) {
        self.through[stage as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Watches until every thread has ended.
    fn watch(&self, mut progress: impl FnMut([u64; 2], Duration)) {
        let through = || [0, 1].map(|stage: usize| self.through[stage].load(Ordering::Relaxed));
        let mut told = Instant::now();
        let mut at_work = self.at_work();
        while *at_work > 0 {
            (at_work, _) =
                self.all_done.wait_timeout(at_work, WATCH_EVERY).unwrap_or_else(PoisonError::into_inner);
            drop(at_work);
            let ended = self.control.ended().is_some();
            if ended {
                self.pipeline.wake();
            }
            if let Some(interrupt) = self.interrupt {
                let limit = if ended { Duration::ZERO } else { self.patience };
                self.watched.iter().for_each(|worker| worker.interrupt_after(limit, self.begin, interrupt));
            }
            if told.elapsed() >= PROGRESS_EVERY {
                progress(through(), self.begin.elapsed());
                told = Instant::now();
            }
            at_work = self.at_work();
        }
        drop(at_work);
        progress(through(), self.begin.elapsed());
    }

    fn at_work(&self) -> MutexGuard<'_, usize> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a thread as at work from before it starts until its [`Shift`] is dropped.
    fn begin_shift(&self) -> Shift<'_, 'a, I> {
        *self.at_work() += 1;
        Shift(self)
    }
}

type Body<'scope> = Box<dyn FnOnce() -> Tally + Send + 'scope>;

/// A thread's time at work. Where it ends by a panic, so does the run, and nobody waits for what it had in hand.
struct Shift<'r, 'a, I: Iterator<Item = Chunk> + Send>(&'r Run<'a, I>);

impl<I: Iterator<Item = Chunk> + Send> Drop for Shift<'_, '_, I> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.control.declare_dead();
            self.0.pipeline.wake();
        }
        *self.0.at_work() -= 1;
        self.0.all_done.notify_all();
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
