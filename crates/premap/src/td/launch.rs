//! The launch itself: the phases in order.
//!
//! What the engine does not do, adding pages and finalizing, is done on the calling thread. A call that goes on is interrupted
//! by a timer, and retries end with patience, as the engine's do. Where there is no timer to be had, the launch goes on
//! without, as it would without premap.

use std::time::{Duration, Instant};

use premap_address::{GpaRange, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::tdx::{KVM_TDX_MEASURE_MEMORY_REGION, TdVcpu, TdVm, TdxError, kvm_tdx_init_mem_region};

use super::piece::Piece;
use super::report::{LaunchReport, Phase, PhaseReport};
use crate::alarm::Alarm;
use crate::budget::Stop;
use crate::control::Control;
use crate::engine::{DEFAULT_PATIENCE, Engine, Error, Stages};
use crate::gate::Gate;
use crate::interrupt::Interrupt;
use crate::memory::Region;
use crate::patience::Patience;
use crate::plan::{Plan, PlanError};
use crate::report::{Reason, Report};

/// How often a call that goes on is interrupted.
const INTERRUPT_EVERY: Duration = Duration::from_millis(10);

/// Pages that are added by one call: 2 MiB, so that progress is told and a stop is heard.
const BATCH: u64 = 512;

/// Why a TD could not be launched. It can't be used then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A launch needs a vCPU to add pages with.
    #[error("a TD is launched with its vCPUs; lend at least one")]
    NoVcpu,
    /// Two pieces have a page in common.
    #[error("the pieces at {0} and {1} overlap; each page is added once")]
    Overlap(GpaRange, GpaRange),
    /// The content of a piece is longer than its place.
    #[error("the piece at {range} has {content} bytes of content, more than it has room for")]
    TooLong {
        /// Its place.
        range: GpaRange,
        /// Bytes of its content.
        content: usize,
    },
    /// A phase's engine could not begin.
    #[error("can't begin the phase {phase}: {error}")]
    Engine {
        /// Which.
        phase: Phase,
        /// Why.
        #[source]
        error: Error,
    },
    /// Memory can't be described.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Some memory could not be reserved, though this KVM reserves.
    #[error("{} of {} bytes could not be reserved: {}", report.asked - report.second.mapped, report.asked, why(report))]
    NotReserved {
        /// What became of each byte.
        report: Box<Report>,
    },
    /// KVM or the TDX module refused a vCPU or the end.
    #[error("{phase}: {error}")]
    Refused {
        /// In which phase.
        phase: Phase,
        /// What it said.
        #[source]
        error: TdxError,
    },
    /// KVM or the TDX module refused to add a page.
    #[error("can't add the page at {gpa:#x}: {error}")]
    NotAdded {
        /// The first page that was not added.
        gpa: u64,
        /// What it said.
        #[source]
        error: TdxError,
    },
    /// It was stopped, or KVM stayed busy.
    #[error("the launch ended early: {0}")]
    Ended(Reason),
}

fn why(report: &Report) -> String {
    report.unmapped.first().map_or_else(String::new, |lost| format!("{} {}", lost.range, lost.reason))
}

/// How far a launch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchProgress {
    /// The phase under way.
    pub phase: Phase,
    /// Bytes of it that are done.
    pub done: u64,
    /// All its bytes.
    pub all: u64,
}

type Callback<'a> = Box<dyn FnMut(&LaunchProgress) + 'a>;

/// Launches a TD.
pub struct Launch<'a> {
    pieces: Vec<Piece<'a>>,
    rcx: u64,
    memory: Vec<GpaRange>,
    reserve: bool,
    patience: Duration,
    stop: Option<Stop>,
    progress: Option<Callback<'a>>,
}

impl std::fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Launch")
            .field("pieces", &self.pieces)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

impl<'a> Launch<'a> {
    /// A launch of what these pieces hold, added in this order. `rcx` is what each vCPU finds in RCX: by convention the
    /// address of the TD HOB.
    ///
    /// # Errors
    /// Pieces that overlap, or whose content is longer than their place.
    pub fn new(pieces: Vec<Piece<'a>>, rcx: u64) -> Result<Self, LaunchError> {
        for (at, piece) in pieces.iter().enumerate() {
            let (range, content) = (piece.range, piece.content.len());
            if content as u64 > range.bytes() {
                return Err(LaunchError::TooLong { range, content });
            }
            if let Some(other) = pieces[..at].iter().find(|other| other.range.intersection(range).is_some()) {
                return Err(LaunchError::Overlap(other.range, range));
            }
        }
        Ok(Self {
            pieces,
            rcx,
            memory: Vec::new(),
            reserve: true,
            patience: DEFAULT_PATIENCE,
            stop: None,
            progress: None,
        })
    }

    /// The guest's private memory: what of it no piece holds is mapped after the launch, so that the guest's ACCEPT takes no
    /// exit. None unless set.
    #[must_use]
    pub fn map_rest(mut self, memory: impl IntoIterator<Item = GpaRange>) -> Self {
        self.memory = memory.into_iter().collect();
        self
    }

    /// Leaves the Secure-EPT to be built as pages are added, for comparison, or for a KVM that reserves nothing.
    #[must_use]
    pub fn without_reserving(mut self) -> Self {
        self.reserve = false;
        self
    }

    /// How long a call, or calls that KVM has repeated, may go without progress; [`DEFAULT_PATIENCE`] unless set.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Lets `stop` end the launch from any thread. The TD can't be used then.
    #[must_use]
    pub fn stop(mut self, stop: &Stop) -> Self {
        self.stop = Some(stop.clone());
        self
    }

    /// Calls back with progress, on the calling thread.
    #[must_use]
    pub fn progress(mut self, callback: impl FnMut(&LaunchProgress) + 'a) -> Self {
        self.progress = Some(Box::new(callback));
        self
    }

    /// Launches the TD: its VM initialised, its slots set, its memory private, its vCPUs made and not yet initialised.
    ///
    /// # Errors
    /// Where it can't be launched; the TD is of no use then. Memory that could not be mapped after the launch is no error: it
    /// is in the report, and the guest gets it on demand.
    pub fn run<M: TdVm, C: TdVcpu + Send>(
        mut self,
        vm: &M,
        vcpus: &mut [C],
    ) -> Result<LaunchReport, LaunchError> {
        if vcpus.is_empty() {
            return Err(LaunchError::NoVcpu);
        }
        let pieces: Vec<GpaRange> = self.pieces.iter().map(|piece| piece.range).collect();
        // Before anything is done that can't be undone.
        let rest = plan(self.memory.iter().flat_map(|range| without(*range, &pieces)))?;
        let pieces = plan(pieces)?;
        let mut phases = Vec::new();

        let start = Instant::now();
        for vcpu in &mut *vcpus {
            let refused = |error| LaunchError::Refused { phase: Phase::InitVcpus, error };
            vcpu.tdx_init_vcpu(self.rcx).map_err(refused)?;
        }
        phases.push(ended(Phase::InitVcpus, start, 0));

        let start = Instant::now();
        let reserve =
            if self.reserve { self.map(Phase::Reserve, &pieces, vm, vcpus)? } else { Report::default() };
        self.control()?.ended().map_or(Ok(()), Err).map_err(LaunchError::Ended)?;
        if reserve.second.unsupported.is_none() && reserve.second.mapped < reserve.asked {
            return Err(LaunchError::NotReserved { report: Box::new(reserve) });
        }
        phases.push(ended(Phase::Reserve, start, reserve.second.mapped));

        let start = Instant::now();
        let alarm = self.alarm(Phase::Add)?;
        let added = self.add(&mut vcpus[0], alarm.as_ref())?;
        phases.push(ended(Phase::Add, start, added));

        let start = Instant::now();
        self.finalize(vm, alarm.as_ref())?;
        drop(alarm);
        phases.push(ended(Phase::Finalize, start, 0));

        let start = Instant::now();
        let rest = self.map(Phase::MapRest, &rest, vm, vcpus)?;
        phases.push(ended(Phase::MapRest, start, rest.second.mapped));
        Ok(LaunchReport { phases, reserve, rest })
    }

    /// What may end a phase that no engine runs.
    fn control(&self) -> Result<Control, LaunchError> {
        Ok(Control::new(&Plan::new([])?, self.stop.clone(), None, &Gate::new()))
    }

    /// What interrupts calls on this thread, if it can be had.
    fn alarm(&self, phase: Phase) -> Result<Option<Alarm>, LaunchError> {
        let interrupt = Interrupt::install(None).map_err(|error| LaunchError::Engine { phase, error })?;
        let every = self.patience.clamp(Duration::from_millis(1), INTERRUPT_EVERY);
        Ok(Alarm::new(interrupt, every).ok())
    }

    /// Maps private memory on all vCPUs.
    fn map<M: TdVm, C: TdVcpu + Send>(
        &mut self,
        phase: Phase,
        plan: &Plan,
        vm: &M,
        vcpus: &mut [C],
    ) -> Result<Report, LaunchError> {
        let mut engine = Engine::new().vm(vm).stages(Stages::Second).patience(self.patience);
        if let Some(stop) = &self.stop {
            engine = engine.stop(stop);
        }
        if let Some(callback) = &mut self.progress {
            engine = engine.progress(move |progress| {
                callback(&LaunchProgress { phase, done: progress.second, all: progress.asked });
            });
        }
        engine.run(plan, vcpus).map_err(|error| LaunchError::Engine { phase, error })
    }

    /// Adds every page of every piece; gives how many bytes that were.
    fn add(&mut self, vcpu: &mut impl TdVcpu, alarm: Option<&Alarm>) -> Result<u64, LaunchError> {
        let control = self.control()?;
        let all = self.pieces.iter().map(|piece| piece.range.bytes()).sum();
        let mut done = 0;
        for piece in &self.pieces {
            let source = piece.pages();
            let flags = if piece.measured { KVM_TDX_MEASURE_MEMORY_REGION } else { 0 };
            let mut source_addr = source.as_ptr().expose_provenance() as u64;
            let (mut gpa, mut left) = (piece.range.start().raw(), piece.range.pages());
            let mut patience = Patience::new(self.patience);
            while left > 0 {
                let asked = left.min(BATCH);
                let mut region = kvm_tdx_init_mem_region { source_addr, gpa, nr_pages: asked };
                let result = watched(alarm, || vcpu.tdx_init_mem_region(&mut region, flags));
                let pages = asked.saturating_sub(region.nr_pages);
                if pages > 0 {
                    patience.progress();
                    (source_addr, gpa) = (source_addr + pages * PAGE_SIZE, gpa + pages * PAGE_SIZE);
                    left -= pages;
                    done += pages * PAGE_SIZE;
                    if let Some(callback) = &mut self.progress {
                        callback(&LaunchProgress { phase: Phase::Add, done, all });
                    }
                }
                match result {
                    Ok(()) | Err(TdxError { errno: Errno::INTR, .. }) if pages > 0 => {
                        control.ended().map_or(Ok(()), Err)
                    }
                    Err(TdxError { errno: Errno::INTR, .. }) if patience.is_over() => Err(Reason::NoProgress),
                    Ok(()) | Err(TdxError { errno: Errno::BUSY | Errno::AGAIN | Errno::INTR, .. }) => {
                        patience.back_off(&control)
                    }
                    Err(error) => return Err(LaunchError::NotAdded { gpa, error }),
                }
                .map_err(LaunchError::Ended)?;
            }
        }
        Ok(done)
    }

    fn finalize(&self, vm: &impl TdVm, alarm: Option<&Alarm>) -> Result<(), LaunchError> {
        let control = self.control()?;
        let mut patience = Patience::new(self.patience);
        loop {
            match watched(alarm, || vm.tdx_finalize_vm()) {
                Ok(()) => return Ok(()),
                Err(TdxError { errno: Errno::INTR, .. }) if patience.is_over() => {
                    return Err(LaunchError::Ended(Reason::NoProgress));
                }
                Err(TdxError { errno: Errno::BUSY | Errno::AGAIN | Errno::INTR, .. }) => {
                    patience.back_off(&control).map_err(LaunchError::Ended)?;
                }
                Err(error) => return Err(LaunchError::Refused { phase: Phase::Finalize, error }),
            }
        }
    }
}

/// Makes a call that the alarm interrupts, if there is one.
fn watched<T>(alarm: Option<&Alarm>, call: impl FnOnce() -> T) -> T {
    match alarm {
        Some(alarm) => alarm.during(call),
        None => call(),
    }
}

fn plan(ranges: impl IntoIterator<Item = GpaRange>) -> Result<Plan, PlanError> {
    Plan::new(ranges.into_iter().map(Region::private))
}

fn ended(phase: Phase, start: Instant, bytes: u64) -> PhaseReport {
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    PhaseReport { phase, ns, bytes }
}

/// What of a range no other holds, in ascending order.
fn without(range: GpaRange, others: &[GpaRange]) -> Vec<GpaRange> {
    let mut left = vec![range];
    for other in others {
        left = left.into_iter().flat_map(|part| outside(part, *other)).flatten().collect();
    }
    left
}

/// What of a range lies before and after another.
fn outside(range: GpaRange, other: GpaRange) -> [Option<GpaRange>; 2] {
    let Some(common) = range.intersection(other) else { return [Some(range), None] };
    let before = common.start().raw() - range.start().raw();
    let head = range.split_at(before).map(|(head, _)| head);
    let tail = range.split_at(before + common.bytes()).map(|(_, tail)| tail);
    [head, tail]
}

#[cfg(test)]
mod tests {
    use premap_address::Gpa;

    use super::*;

    fn range(first: u64, pages: u64) -> GpaRange {
        GpaRange::new(Gpa::new(first * PAGE_SIZE), pages * PAGE_SIZE)
    }

    #[test]
    fn the_rest_is_what_no_piece_holds() {
        let check = |others: &[GpaRange], expected: &[GpaRange]| {
            assert_eq!(without(range(10, 10), others), expected, "{others:?}");
        };
        check(&[], &[range(10, 10)]);
        check(&[range(0, 10), range(20, 5)], &[range(10, 10)]);
        check(&[range(12, 2)], &[range(10, 2), range(14, 6)]);
        check(&[range(5, 6), range(19, 9)], &[range(11, 8)]);
        check(&[range(15, 1), range(12, 1)], &[range(10, 2), range(13, 2), range(16, 4)]);
        check(&[range(0, 100)], &[]);
    }

    #[test]
    fn pieces_that_can_t_be_are_refused() {
        let piece =
            |range, content: usize| Piece { range, content: vec![1; content].into(), measured: false };
        let long = Launch::new(vec![piece(range(0, 1), 4097)], 0);
        assert!(matches!(long, Err(LaunchError::TooLong { content: 4097, .. })));
        let twice = Launch::new(vec![piece(range(0, 4), 0), piece(range(3, 1), 0)], 0);
        assert!(matches!(twice, Err(LaunchError::Overlap(..))));
        assert!(Launch::new(vec![piece(range(0, 4), 1), piece(range(4, 1), 4096)], 0).is_ok());
    }
}
