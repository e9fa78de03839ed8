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

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, ScopedJoinHandle};
use std::time::{Duration, Instant};

use premap_kvm::Vcpu;

use crate::clock::Clock;
use crate::control::Control;
use crate::dirty_log::DirtyLogged;
use crate::engine::{Error, Stages};
use crate::host_stage::HostStage;
use crate::interrupt::Interrupt;
use crate::mappings::Mappings;
use crate::muster::Muster;
use crate::pace::{Pace, Pacer};
use crate::pipeline::{Job, Pipeline};
use crate::plan::Plan;
use crate::progress::{Progress, nanos};
use crate::report::{Reason, Report, Stage, Unsupported};
use crate::second_stage::{SecondStage, Usable};
use crate::survey::{Survey, reason_at, survey};
use crate::tally::{Numbered, Tally};
use crate::watchdog::Worker;

/// The shortest time between two calls of a progress callback.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// How often the watchdog looks.
const WATCH_EVERY: Duration = Duration::from_millis(10);
/// How often it interrupts calls that outlive the run: a signal that comes just before its call is lost.
const END_EVERY: Duration = Duration::from_millis(1);
/// How many chunks the host stage may be ahead, for each vCPU.
const CHUNKS_AHEAD: usize = 4;

/// What the engine was told, settled for one run.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) stages: Stages,
    pub(crate) patience: Duration,
    pub(crate) pace: Pace,
    /// Present where the second stage was asked for.
    pub(crate) interrupt: Option<Interrupt>,
    pub(crate) unsupported: Unsupported,
    pub(crate) bytes: Option<u64>,
    pub(crate) host_threads: usize,
    /// How many vCPUs have work.
    pub(crate) vcpus: usize,
    pub(crate) logged: DirtyLogged,
}

/// What the threads of one run share.
pub(crate) struct Run<'a> {
    terms: Terms,
    control: &'a Control,
    clock: Clock,
    pacer: Pacer,
    pipeline: Pipeline,
    watched: Vec<Worker>,
    /// vCPU workers that have not given up.
    usable: AtomicUsize,
    /// Threads that have not ended.
    at_work: AtomicUsize,
    muster: Muster,
    mappings: Mappings,
    /// What was lost before the run began.
    lost: Tally,
}

impl<'a> Run<'a> {
    /// A run of the plan, in chunks of `chunk_bytes` unless it says otherwise. Looks at what its memory is, and touches
    /// none of it yet.
    pub(crate) fn new(terms: Terms, plan: &Plan, chunk_bytes: u64, control: &'a Control) -> Self {
        let mappings = Mappings::read(terms.stages, control.entrance.changes());
        let Survey { pieces, lost } = survey(plan.pieces(), terms.stages, &mappings);
        for stage in [Stage::Host, Stage::Second] {
            control.meter.pass(stage, lost.bytes(stage));
        }
        let chunk_bytes = plan.chunk_bytes(chunk_bytes);
        let Terms { vcpus, host_threads, bytes, pace, interrupt, .. } = terms;
        let room = vcpus.max(1).saturating_mul(CHUNKS_AHEAD).saturating_add(host_threads);
        let workers = interrupt.into_iter().flat_map(|interrupt| (0..vcpus).map(move |_| interrupt));
        Self {
            control,
            clock: Clock::new(),
            pacer: Pacer::new(pace),
            pipeline: Pipeline::new(pieces, chunk_bytes, bytes, room),
            watched: workers.map(Worker::new).collect(),
            usable: AtomicUsize::new(vcpus),
            at_work: AtomicUsize::new(0),
            muster: Muster::default(),
            mappings,
            lost,
            terms,
        }
    }

    /// Does the work and gives the account of it; `progress` is called on this thread.
    pub(crate) fn work<V: Vcpu + Send>(
        self,
        vcpus: &mut [V],
        progress: impl FnMut(&Progress),
    ) -> Result<Report, Error> {
        let theirs = std::thread::scope(|scope| {
            let mut threads: Vec<ScopedJoinHandle<'_, Tally>> = Vec::new();
            let run = &self;
            let hosts = (0..run.terms.host_threads).map(|number| {
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
                        run.wake();
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
        let times = [Stage::Host, Stage::Second].map(|stage| self.clock.read(stage));
        let mut tally = self.lost;
        tally.merge(theirs);
        self.pipeline.lose_rest(self.control, self.terms.stages, &mut tally);
        let asked = self.control.meter.read().asked;
        let mut report = Report { asked, files: self.mappings.blamed(), ..Report::default() };
        tally.write(&mut report);
        for (stage, (share, busy)) in [&mut report.host, &mut report.second].into_iter().zip(times) {
            (stage.ns, stage.busy_ns) = (nanos(share), nanos(busy));
        }
        report.wall_ns = self.control.meter.wall_ns();
        Ok(report)
    }

    /// Waits until every thread of the run has started.
    fn begin_together(&self) {
        let threads = self.terms.host_threads + self.watched.len();
        self.muster.wait_for(threads, || self.control.ended().is_some());
    }

    fn host_worker(&self, _shift: Shift<'_, 'a>) -> Tally {
        self.begin_together();
        let mut tally = Tally::default();
        self.populate_rest(&mut tally);
        tally
    }

    /// Takes chunks through the host stage until none is left.
    fn populate_rest(&self, tally: &mut Tally) {
        while let Some(numbered) = self.pipeline.take(self.control) {
            self.begin_chunk(numbered, tally);
        }
    }

    /// Takes a chunk through the host stage at the run's pace.
    fn begin_chunk(&self, numbered: Numbered, tally: &mut Tally) {
        self.pacer.wait(self.control);
        self.pacer.charge(numbered.chunk.range.bytes(), || self.populate(numbered, tally));
    }

    /// Takes a chunk through the host stage, if that was asked for, and hands it on.
    fn populate(&self, numbered: Numbered, tally: &mut Tally) {
        let Numbered { place, chunk } = numbered;
        let mut ready = Vec::new();
        if self.terms.stages.include(Stage::Host) {
            let stage = HostStage {
                control: self.control,
                clock: &self.clock,
                mappings: &self.mappings,
                patience: self.terms.patience,
            };
            let populated = stage.run(numbered, tally);
            if self.terms.stages.include(Stage::Second) {
                for (range, reason) in populated.absent {
                    tally.lost(
                        place,
                        Stage::Second,
                        range,
                        reason_at(Stage::Second, self.terms.stages, reason),
                    );
                    self.control.meter.pass(Stage::Second, range.bytes());
                }
                ready = populated.present;
            }
        } else {
            tally.lost(place, Stage::Host, chunk.range, Reason::NotAsked);
            ready.push(chunk.range);
        }
        if !self.terms.stages.include(Stage::Second) {
            tally.lost(place, Stage::Second, chunk.range, Reason::NotAsked);
        }
        let ready = self.terms.logged.take_out(ready, |logged| {
            tally.lost(place, Stage::Second, logged, Reason::DirtyLogged);
            self.control.meter.pass(Stage::Second, logged.bytes());
        });
        self.control.meter.pass(Stage::Host, chunk.range.bytes());
        self.pipeline.put(place, ready);
    }

    fn vcpu_worker<V: Vcpu>(&self, worker: &Worker, vcpu: &mut V, _shift: Shift<'_, 'a>) -> Tally {
        self.begin_together();
        let mut tally = Tally::default();
        let mut stage = SecondStage {
            vcpu,
            control: self.control,
            clock: &self.clock,
            watched: worker.watch(self.control.meter.begin()),
            patience: self.terms.patience,
            unsupported: self.terms.unsupported,
            stalled: false,
            changes: self.control.entrance.changes(),
            refused: None,
        };
        let mut usable = Usable::Yes;
        while let Some(job) = self.pipeline.next(self.control) {
            let was = usable;
            match job {
                Job::Host(numbered) => self.begin_chunk(numbered, &mut tally),
                Job::Second(place, ranges) => self.pacer.charge(0, || {
                    for range in ranges {
                        match usable {
                            Usable::Yes => usable = stage.run(place, range, &mut tally),
                            Usable::No => tally.lost(place, Stage::Second, range, Reason::NoProgress),
                        }
                        self.control.meter.pass(Stage::Second, range.bytes());
                    }
                }),
            }
            // A vCPU that has given up leaves the second stage to the others; the last one stays to account for it.
            if was != usable && self.usable.fetch_sub(1, Ordering::Relaxed) > 1 {
                self.populate_rest(&mut tally);
                break;
            }
        }
        tally
    }

    /// Watches until every thread has ended.
    fn watch(&self, mut progress: impl FnMut(&Progress)) {
        let mut told = Instant::now();
        let begin = self.control.meter.begin();
        while self.at_work.load(Ordering::Acquire) > 0 {
            let ended = self.control.ended().is_some();
            let (every, limit) =
                if ended { (END_EVERY, Duration::ZERO) } else { (WATCH_EVERY, self.terms.patience) };
            if ended {
                self.wake();
            }
            self.watched.iter().for_each(|worker| worker.interrupt_after(limit, begin));
            self.control.bell.wait(every);
            if told.elapsed() >= PROGRESS_EVERY {
                progress(&self.control.meter.read());
                told = Instant::now();
            }
        }
        progress(&self.control.meter.read());
    }

    /// Wakes every worker that waits for something, to look whether the run has ended.
    fn wake(&self) {
        self.muster.wake();
        self.pipeline.wake();
        self.pacer.wake();
        self.control.entrance.wake();
    }

    /// Counts a thread as at work from before it starts until its [`Shift`] is dropped.
    fn begin_shift(&self) -> Shift<'_, 'a> {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        Shift(self)
    }
}

type Body<'scope> = Box<dyn FnOnce() -> Tally + Send + 'scope>;

/// A thread's time at work. Where it ends by a panic, so does the run, and nobody waits for what it had in hand.
struct Shift<'r, 'a>(&'r Run<'a>);

impl Drop for Shift<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.control.declare_dead();
            self.0.wake();
        }
        self.0.at_work.fetch_sub(1, Ordering::Release);
        self.0.control.bell.ring();
    }
}
