//! The engine: takes a plan and lent vCPUs, and gives a report.
//!
//! What a caller sets is here; `run` has the threads, and `pipeline` the way of the chunks between them.

use std::ffi::c_int;
use std::time::Duration;

use premap_address::GpaRange;
use premap_kvm::probe::{self, PreFault};
use premap_kvm::{Vcpu, Vm};

use crate::budget::{Budget, Stop};
use crate::control::Control;
use crate::dirty_log::DirtyLogged;
use crate::gate::Gate;
use crate::interrupt::Interrupt;
use crate::pace::Pace;
use crate::plan::{DEFAULT_CHUNK, Plan};
use crate::progress::Progress;
use crate::report::{PageCounts, Report, Stage, Unsupported};
use crate::room::Room;
use crate::run::{Run, Terms};

/// How long a call may take before the watchdog interrupts it, unless the caller says otherwise.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(1);

/// The most threads that only make memory present: more are not faster on any machine.
const MAX_HOST_THREADS: usize = 1024;

/// Which stages to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stages {
    /// Host, then second: the only way that saves a writing guest its faults.
    #[default]
    Both,
    /// Only make memory present on the host; needs no vCPU.
    Host,
    /// Only ask KVM. On fresh private memory this costs the guest two faults a page instead of one.
    Second,
}

impl Stages {
    pub(crate) const fn include(self, stage: Stage) -> bool {
        !matches!((self, stage), (Self::Host, Stage::Second) | (Self::Second, Stage::Host))
    }
}

/// Why a run could not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The second stage was asked for and no vCPU was lent.
    #[error("the second stage needs at least one vCPU; lend one, or ask for Stages::Host")]
    NoVcpu,
    /// The signal that interrupts a stalled call has a handler of the program's own, or is ignored.
    #[error("signal {0} has a handler already; give the engine a signal that the program does not use")]
    SignalTaken(c_int),
    /// There is no such signal, or it can't be handled.
    #[error("signal {0} can't be handled; give the engine a real-time signal")]
    BadSignal(c_int),
    /// The caller named no signal, and every real-time signal has a handler already.
    #[error(
        "every real-time signal has a handler already; name one that the engine may have to interrupt its calls"
    )]
    NoFreeSignal,
    /// A run in the background could not be given its thread; or one in the foreground had none either, and no timer, so
    /// that nothing could interrupt its calls.
    #[error("can't start a worker thread: {0}; map in the foreground, or raise the limit on threads")]
    Spawn(#[source] std::io::Error),
}

type Callback<'a> = Box<dyn FnMut(&Progress) + 'a>;

/// Runs plans. Made once, it can run any number of them.
#[derive(Default)]
pub struct Engine<'a> {
    vm: Option<&'a dyn Vm>,
    stages: Stages,
    budget: Budget,
    pace: Pace,
    stop: Option<Stop>,
    gate: Gate,
    progress: Option<Callback<'a>>,
    patience: Option<Duration>,
    signal: Option<c_int>,
    host_threads: Option<usize>,
    logged: DirtyLogged,
}

impl std::fmt::Debug for Engine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("stages", &self.stages)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

impl<'a> Engine<'a> {
    /// Makes an engine that runs both stages, without limit.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the engine the VM, so that it can say why pre-faulting is not supported, and count pages by size.
    #[must_use]
    pub fn vm(mut self, vm: &'a dyn Vm) -> Self {
        self.vm = Some(vm);
        self
    }

    /// Chooses the stages.
    #[must_use]
    pub fn stages(mut self, stages: Stages) -> Self {
        self.stages = stages;
        self
    }

    /// Limits each run.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Lets `stop` end the runs from any thread.
    #[must_use]
    pub fn stop(mut self, stop: &Stop) -> Self {
        self.stop = Some(stop.clone());
        self
    }

    /// Keeps each run to a pace: full speed unless set.
    #[must_use]
    pub fn pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// Makes no call about guest memory while `gate` is closed: the VMM closes it around changes of its memslots.
    #[must_use]
    pub fn gate(mut self, gate: &Gate) -> Self {
        self.gate = gate.clone();
        self
    }

    /// Calls back with progress, on the calling thread, never more often than every 50 ms, and once at the end. A run in
    /// the background has no calling thread; it [can be asked](crate::Background::progress) at any moment.
    #[must_use]
    pub fn progress(mut self, callback: impl FnMut(&Progress) + 'a) -> Self {
        self.progress = Some(Box::new(callback));
        self
    }

    /// How long a call may go without progress before it is given up; [`DEFAULT_PATIENCE`] unless set.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Which signal interrupts a stalled call. Unless set it is the last but one real-time signal, or the next before it that
    /// has no handler.
    #[must_use]
    pub fn signal(mut self, signal: c_int) -> Self {
        self.signal = Some(signal);
        self
    }

    /// How many threads make memory present on the host besides those of the lent vCPUs: none unless set. With
    /// [`Stages::Host`], where no vCPU has work, how many do in all: as many as vCPUs are lent, at least one, unless set.
    /// No more than 1024 are started, whatever the number.
    ///
    /// One such thread beside a single vCPU lets the host stage of the next chunk overlap the second stage of this one.
    #[must_use]
    pub fn host_threads(mut self, threads: usize) -> Self {
        self.host_threads = Some(threads);
        self
    }

    /// Tells which guest memory has its dirty pages logged (`KVM_MEM_LOG_DIRTY_PAGES`), as for a migration or a snapshot
    /// of what changed. It is made present on the host and not mapped in the guest: a pre-fault would mark all of it dirty.
    /// Linux does not tell which slots are logged, so who logs must say so.
    #[must_use]
    pub fn dirty_logged(mut self, ranges: impl IntoIterator<Item = GpaRange>) -> Self {
        self.logged.extend(ranges);
        self
    }

    /// Maps the plan's memory and tells what became of every byte.
    ///
    /// Safe to run twice: what is present stays so. Content is never changed. Where the system has fewer threads to give than
    /// are wanted, the run makes do with those, and with none the calling thread does the work; none is left afterwards.
    ///
    /// # Errors
    /// Only where the run can't begin; what goes wrong in it is in the report.
    ///
    /// # Panics
    /// Where a method of the caller's `Vcpu` panics, or the progress callback: the run ends as if it had been stopped, then
    /// the panic goes on.
    pub fn run<V: Vcpu + Send>(&mut self, plan: &Plan, vcpus: &mut [V]) -> Result<Report, Error> {
        let control = self.control(plan);
        let terms = self.settle(vcpus, &control)?;
        let vcpus = &mut vcpus[..terms.vcpus];
        let run = Run::new(terms, plan, DEFAULT_CHUNK, &control);
        let mut report = run.work(vcpus, |progress| {
            if let Some(callback) = &mut self.progress {
                callback(progress);
            }
        })?;
        report.pages = self.vm.and_then(|vm| vm.stats().ok()).map(|stats| PageCounts::from_stats(&stats));
        report.wall_ns = control.meter.wall_ns();
        Ok(report)
    }

    /// What a run of the plan shares with those outside.
    pub(crate) fn control(&self, plan: &Plan) -> Control {
        Control::new(plan, self.stop.clone(), self.budget.deadline, &self.gate)
    }

    /// Settles what a run on these vCPUs is to do.
    pub(crate) fn settle<V: Vcpu>(&self, vcpus: &mut [V], control: &Control) -> Result<Terms, Error> {
        let second = self.stages.include(Stage::Second);
        let interrupt = match (second, vcpus.is_empty()) {
            (true, true) => return Err(Error::NoVcpu),
            (true, false) => Some(Interrupt::install(self.signal)?),
            (false, _) => None,
        };
        let mut unsupported = Unsupported::Unknown;
        if second && let (Some(vm), Some(vcpu)) = (self.vm, vcpus.first_mut()) {
            unsupported = probe(vm, vcpu, control);
        }
        let host_threads = match self.stages {
            Stages::Both => self.host_threads.unwrap_or(0),
            Stages::Host => self.host_threads.unwrap_or(vcpus.len()).max(1),
            Stages::Second => 0,
        }
        .min(MAX_HOST_THREADS);
        Ok(Terms {
            stages: self.stages,
            patience: self.patience.unwrap_or(DEFAULT_PATIENCE),
            pace: self.pace,
            interrupt,
            unsupported,
            bytes: self.budget.bytes,
            room: Room::new(&self.budget),
            host_threads,
            vcpus: if second { vcpus.len() } else { 0 },
            logged: self.logged.clone(),
        })
    }
}

/// Asks the VM what it can do, and tells what EOPNOTSUPP will mean if it comes all the same.
fn probe(vm: &dyn Vm, vcpu: &mut impl Vcpu, control: &Control) -> Unsupported {
    match probe::pre_fault(vm, vcpu) {
        PreFault::Supported => return Unsupported::VcpuState,
        PreFault::ShadowPaging => control.declare_unsupported(Unsupported::ShadowPaging),
        PreFault::NotInKernel | PreFault::ForeignCapability => {
            control.declare_unsupported(Unsupported::NotInKernel);
        }
        // The first call will tell.
        _ => {}
    }
    Unsupported::Unknown
}
