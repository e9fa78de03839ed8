//! One run: its threads and who does what.
//!
//! ```text
//!   premap-vcpu-N   maps what is ready at the second stage, through one lent vCPU; makes the next chunk present
//!                   while nothing is ready
//!   premap-host-N   only makes chunks present, where the caller wants more threads than vCPUs
//!   the caller      watches: interrupts calls that stall or outlive the run, and reports progress
//! ```
//!
//! Where the system has fewer threads to give, those do; where it has none, the caller is the one worker, and a timer
//! interrupts its calls.
//!
//! So there are as many threads at work as the caller lends vCPUs, and with two or more the host stage of the next chunks
//! overlaps the second stage of this one. While a vCPU is lent (`&mut`) it can't run the guest, and nobody waits for its
//! mutex.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

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
use crate::progress::{Progress, Told, nanos};
use crate::report::{Reason, Report, Stage, Unsupported};
use crate::room::Room;
use crate::second_stage::{SecondStage, Usable};
use crate::survey::{Survey, reason_at, survey};
use crate::tally::{Numbered, Tally};
use crate::watchdog::{Watched, Worker};

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
    /// How much memory there is to take.
    pub(crate) room: Room,
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
    pub(crate) fn new(mut terms: Terms, plan: &Plan, chunk_bytes: u64, control: &'a Control) -> Self {
        let mappings = Mappings::read(terms.stages, control.entrance.changes_over());
        let Survey { pieces, mut lost } = survey(plan.pieces(), terms.stages, &mappings);
        let pieces = terms.room.fit(pieces, terms.stages, &mappings, &mut lost);
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

    /// Does the work and gives the account of it; `progress` is called on this thread. Where it panics the run ends as if
    /// stopped, and then the panic goes on.
    pub(crate) fn work<V: Vcpu + Send>(
        self,
        vcpus: &mut [V],
        progress: impl FnMut(&Progress),
    ) -> Result<Report, Error> {
        let mut told = Told::new(progress);
        let lent = Mutex::new(self.watched.iter().zip(vcpus).rev().collect());
        let theirs = std::thread::scope(|scope| self.share(scope, &lent, &mut told));
        told.end();
        let theirs = theirs?;
        let times = [Stage::Host, Stage::Second].map(|stage| self.clock.read(stage));
        let mut tally = self.lost;
        tally.merge(theirs);
        if let Some(limit) = self.control.short_of() {
            tally.limit.get_or_insert_with(|| limit.to_string());
        }
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

    /// Shares the work among threads, watches until they have ended, and gives their account.
    fn share<'scope, V: Vcpu + Send>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        lent: &'scope Mutex<Vec<Lent<'_, V>>>,
        told: &mut Told<impl FnMut(&Progress)>,
    ) -> Result<Tally, Error> {
        let mut threads: Vec<ScopedJoinHandle<'_, Tally>> = Vec::new();
        let mut refused = None;
        // vCPUs first: they do either stage.
        let vcpus = (0..self.watched.len()).map(|number| (Role::Vcpu, format!("premap-vcpu-{number}")));
        let hosts = (0..self.terms.host_threads).map(|number| (Role::Host, format!("premap-host-{number}")));
        for (role, name) in vcpus.chain(hosts) {
            let shift = self.begin_shift();
            let body = move || {
                let _shift = shift;
                self.muster.wait(|| self.control.ended().is_some());
                match role {
                    Role::Host => self.host_worker(&mut || {}),
                    Role::Vcpu => next_lent(lent).map_or_else(Tally::default, |(worker, vcpu)| {
                        self.vcpu_worker(worker.watch(self.control.meter.begin()), vcpu, &mut || {})
                    }),
                }
            };
            match Builder::new().name(name).spawn_scoped(scope, body) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = refused.filter(|_| threads.is_empty()) {
            return self.work_alone(error, lent, told);
        }
        self.usable.store(threads.len().min(self.watched.len()), Ordering::Relaxed);
        self.muster.expect(threads.len());
        self.watch(told);
        // All are joined before a panic goes on: a thread that is only waited for may outlive the run.
        let ended: Vec<_> = threads.into_iter().map(ScopedJoinHandle::join).collect();
        let mut tally = Tally::default();
        for ended in ended {
            tally.merge(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        Ok(tally)
    }

    /// Does all the work on the calling thread, since there is no other.
    ///
    /// # Errors
    /// What is said of threads, where nothing could interrupt calls.
    fn work_alone<V: Vcpu>(
        &self,
        error: io::Error,
        lent: &Mutex<Vec<Lent<'_, V>>>,
        told: &mut Told<impl FnMut(&Progress)>,
    ) -> Result<Tally, Error> {
        self.usable.store(1, Ordering::Relaxed);
        let tell = &mut || told.tell(self.control);
        let tally = match next_lent(lent) {
            None => self.host_worker(tell),
            Some((worker, vcpu)) => {
                let every = self.watch_every();
                let watched = worker.watch_alone(self.control.meter.begin(), every);
                self.vcpu_worker(watched.map_err(|_| Error::Spawn(error))?, vcpu, tell)
            }
        };
        told.last(self.control);
        Ok(tally)
    }

    fn host_worker(&self, between: &mut dyn FnMut()) -> Tally {
        let mut tally = Tally::default();
        self.populate_rest(&mut tally, between);
        tally
    }

    /// Takes chunks through the host stage until none is left.
    fn populate_rest(&self, tally: &mut Tally, between: &mut dyn FnMut()) {
        while let Some(numbered) = self.pipeline.take(self.control) {
            self.begin_chunk(numbered, tally);
            between();
        }
    }

    /// Takes a chunk through the host stage at the run's pace.
    fn begin_chunk(&self, numbered: Numbered, tally: &mut Tally) {
        self.pacer.wait(self.control);
        let bytes = numbered.chunk.range.bytes();
        // Where others have used up the room that there was, the run is over, and the chunk lost for that reason.
        let grant = self.terms.room.grant(&numbered.chunk, &self.mappings, self.control);
        let _grant = grant.map_err(|limit| self.control.run_short(limit));
        self.pacer.charge(bytes, || self.populate(numbered, tally));
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

    fn vcpu_worker<V: Vcpu>(&self, watched: Watched<'_>, vcpu: &mut V, between: &mut dyn FnMut()) -> Tally {
        let mut tally = Tally::default();
        let mut stage = SecondStage {
            vcpu,
            control: self.control,
            clock: &self.clock,
            watched,
            patience: self.terms.patience,
            unsupported: self.terms.unsupported,
            stalled: false,
            changes: self.control.entrance.changes_over(),
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
                self.populate_rest(&mut tally, between);
                break;
            }
            between();
        }
        tally
    }

    /// Watches until every thread has ended.
    fn watch(&self, told: &mut Told<impl FnMut(&Progress)>) {
        let begin = self.control.meter.begin();
        while self.at_work.load(Ordering::Acquire) > 0 {
            let ended = self.control.ended().is_some();
            let (every, limit) =
                if ended { (END_EVERY, Duration::ZERO) } else { (self.watch_every(), self.terms.patience) };
            if ended {
                self.wake();
            }
            self.watched.iter().for_each(|worker| worker.interrupt_after(limit, begin));
            self.control.bell.wait(every);
            told.tell(self.control);
        }
        told.last(self.control);
    }

    /// How often to look at calls: often enough for the patience that the caller has.
    fn watch_every(&self) -> Duration {
        self.terms.patience.clamp(END_EVERY, WATCH_EVERY)
    }

    /// Wakes every worker that waits for something, to look whether the run has ended.
    fn wake(&self) {
        self.muster.wake();
        self.pipeline.wake();
        self.pacer.wake();
        self.terms.room.wake();
        self.control.entrance.wake();
    }

    /// Counts a thread as at work from before it starts until its [`Shift`] is dropped.
    fn begin_shift(&self) -> Shift<'_, 'a> {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        Shift(self)
    }
}

/// A vCPU and who watches its worker.
type Lent<'a, V> = (&'a Worker, &'a mut V);

/// What a thread does.
#[derive(Clone, Copy, Debug)]
enum Role {
    Vcpu,
    Host,
}

fn next_lent<'a, V>(lent: &Mutex<Vec<Lent<'a, V>>>) -> Option<Lent<'a, V>> {
    lent.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

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
