//! The second stage: asks KVM to map a chunk that the host stage has made present.
//!
//! The call advances its range as it goes and swallows errors after progress, so it is repeated until the range is done,
//! and an error always speaks of the range's first page. What each errno means here:
//!
//! | errno | what is done |
//! |---|---|
//! | EINTR | again, unless the run ended; where the watchdog's time passed without progress, once more with a new root, then abandoned |
//! | EAGAIN | again after a pause that grows, until the watchdog's time has passed: abandoned |
//! | ENOENT | no memslot holds the page: skipped, as far as the [`hole`] reaches |
//! | EFAULT, EHWPOISON | the page failed, and those behind it that are refused alike |
//! | EOPNOTSUPP, ENOTTY | no second stage on this VM: skipped, now and for the rest of the run |
//! | EIO | the VM is dead: the run ends |
//! | EINVAL, ENOMEM, ENOSPC, others | the rest of the chunk failed |
//!
//! Progress is what a call did in whole pages of what it was asked for; whatever else it says of its range is none.

use std::time::{Duration, Instant};

use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Vcpu};

use crate::clock::Clock;
use crate::control::Control;
use crate::forgotten::Standing;
use crate::hole::{self, Page};
use crate::patience::Patience;
use crate::report::{Reason, Stage, Unsupported};
use crate::tally::Tally;
use crate::watchdog::Watched;

/// Maps ranges through one lent vCPU.
pub(crate) struct SecondStage<'a, V> {
    pub(crate) vcpu: &'a mut V,
    pub(crate) control: &'a Control,
    pub(crate) clock: &'a Clock,
    pub(crate) watched: Watched<'a>,
    pub(crate) patience: Duration,
    /// What EOPNOTSUPP means here, as far as the probe could tell.
    pub(crate) unsupported: Unsupported,
    /// Whether the last call stalled. A vCPU that stalls twice in a row will not recover: its root is stale.
    pub(crate) stalled: bool,
    /// How often the gate had been closed when the vCPU's root was last known to be good.
    pub(crate) changes: u64,
    /// Pages refused in a row of one region, since the vCPU last mapped one: the region's place, why, and how many.
    pub(crate) refused: Option<(u64, Errno, u64)>,
}

/// What became of a call.
enum Called {
    /// How many bytes it did, and what it said.
    Did(u64, premap_kvm::Result<()>),
    /// It was not made: so many bytes were taken out of the plan.
    Gone(u64),
}

/// What to do about a page that was refused.
enum Refusal {
    /// Lose this page, and those refused alike, for the reason and go on behind them.
    Page(Reason),
    /// Lose the rest of the range for the reason.
    Rest(Reason),
    /// Try again.
    Again,
}

impl<V: Vcpu> SecondStage<'_, V> {
    /// Maps the range as far as that can be. Gives whether this vCPU is worth another range.
    pub(crate) fn run(&mut self, place: u64, range: GpaRange, tally: &mut Tally) -> Usable {
        let mut rest = Some(range);
        let mut patience = Patience::new(self.patience);
        let mut renewed = false;
        while let Some(left) = rest {
            if let Some(why) = self.control.ended().or(self.control.unsupported().map(Reason::Unsupported)) {
                tally.lost(place, Stage::Second, left, why);
                break;
            }
            let (done, result) = match self.call(left, &mut patience, tally) {
                Ok(Called::Did(done, result)) => (done, result),
                Ok(Called::Gone(bytes)) => {
                    let gone = GpaRange::new(left.start(), bytes);
                    tally.lost(place, Stage::Second, gone, Reason::Forgotten);
                    rest = after(left, bytes);
                    continue;
                }
                Err(why) => {
                    tally.lost(place, Stage::Second, left, why);
                    break;
                }
            };
            if done > 0 {
                tally.mapped(Stage::Second, done);
                patience.progress();
                self.stalled = false;
                self.refused = None;
                rest = after(left, done);
                continue;
            }
            // A success without progress is none; it is paced like EAGAIN.
            let errno = result.err().unwrap_or(Errno::AGAIN);
            match self.judge(errno, &mut patience, &mut renewed) {
                Refusal::Again => {}
                Refusal::Page(reason) => {
                    let bytes = self.refused_alike(place, left, errno, &mut patience, tally);
                    tally.lost(place, Stage::Second, GpaRange::new(left.start(), bytes), reason);
                    patience.progress();
                    rest = after(left, bytes);
                }
                Refusal::Rest(reason) => {
                    tally.lost(place, Stage::Second, left, reason);
                    if reason == Reason::NoProgress && std::mem::replace(&mut self.stalled, true) {
                        return Usable::No;
                    }
                    break;
                }
            }
        }
        Usable::Yes
    }

    /// How many bytes are refused like the range's first page.
    fn refused_alike(
        &mut self,
        place: u64,
        range: GpaRange,
        errno: Errno,
        patience: &mut Patience,
        tally: &mut Tally,
    ) -> u64 {
        let alike = |(at, other, _): &(u64, Errno, u64)| (*at, *other) == (place, errno);
        let before = self.refused.filter(alike).map_or(0, |(_, _, pages)| pages);
        let pages = hole::extent(range.pages(), before, |page| {
            let Some((_, behind)) = range.split_at(page * PAGE_SIZE) else { return Page::Unknown };
            if self.control.ended().is_some() {
                return Page::Unknown;
            }
            match self.call(GpaRange::new(behind.start(), PAGE_SIZE), patience, tally) {
                Ok(Called::Did(0, Err(other))) if other == errno => Page::Refused,
                Ok(Called::Did(0, Err(Errno::NOENT | Errno::FAULT | Errno::HWPOISON))) => Page::Differs,
                Ok(Called::Did(0, _) | Called::Gone(_)) | Err(_) => Page::Unknown,
                Ok(Called::Did(..)) => Page::Differs,
            }
        });
        self.refused = Some((place, errno, before + pages));
        pages * PAGE_SIZE
    }

    /// One call, once the gate is open, on as much of `range` as is there.
    ///
    /// # Errors
    /// Why the run ended before.
    fn call(
        &mut self,
        range: GpaRange,
        patience: &mut Patience,
        tally: &mut Tally,
    ) -> Result<Called, Reason> {
        let Self { vcpu, control, clock, watched, changes, .. } = self;
        let came = Instant::now();
        let pass = control.enter(Some(watched.seat()))?;
        // The time at the gate was not the call's. To start anew would let a gate that opens and closes go on for ever.
        patience.excuse(came.elapsed());
        if std::mem::replace(changes, pass.changes()) != pass.changes() {
            // Slots may have changed, and the root gone stale. Where it can't be renewed, the watchdog is left.
            let _ = vcpu.renew_root();
        }
        let size = match pass.standing(range) {
            Standing::There(bytes) => bytes,
            Standing::Gone(bytes) => return Ok(Called::Gone(bytes)),
        };
        let mut arg = kvm_pre_fault_memory { gpa: range.start().raw(), size, ..Default::default() };
        tally.called(Stage::Second);
        let result = watched.during(|| clock.time(Stage::Second, || vcpu.pre_fault_memory(&mut arg)));
        drop(pass);
        // A large mapping may reach beyond what was asked: only what was asked counts.
        let done = Gpa::new(arg.gpa).checked_offset_from(range.start()).unwrap_or(0).min(size);
        Ok(Called::Did(done / PAGE_SIZE * PAGE_SIZE, result))
    }

    fn judge(&mut self, errno: Errno, patience: &mut Patience, renewed: &mut bool) -> Refusal {
        let why = match errno {
            Errno::INTR if !patience.is_over() => {
                patience.pause();
                return Refusal::Again;
            }
            // A root that went stale is what a call spins on; with a new one it may well go on.
            Errno::INTR if !std::mem::replace(renewed, true) && self.vcpu.renew_root().is_ok() => {
                patience.progress();
                return Refusal::Again;
            }
            Errno::INTR => Reason::NoProgress,
            Errno::AGAIN => match patience.back_off(self.control) {
                Ok(()) => return Refusal::Again,
                Err(why) => why,
            },
            Errno::NOENT => return Refusal::Page(Reason::NoMemslot),
            Errno::FAULT | Errno::HWPOISON => return Refusal::Page(Reason::Errno(errno)),
            Errno::OPNOTSUPP => {
                self.control.declare_unsupported(self.unsupported);
                Reason::Unsupported(self.unsupported)
            }
            Errno::NOTTY => {
                self.control.declare_unsupported(Unsupported::NotInKernel);
                Reason::Unsupported(Unsupported::NotInKernel)
            }
            Errno::IO => {
                self.control.declare_dead();
                Reason::VmDead
            }
            _ => Reason::Errno(errno),
        };
        Refusal::Rest(why)
    }
}

/// Whether a vCPU can go on pre-faulting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usable {
    Yes,
    No,
}

fn after(range: GpaRange, done: u64) -> Option<GpaRange> {
    range.split_at(done).map(|(_, rest)| rest)
}
