//! The second stage: asks KVM to map a chunk that the host stage has made present.
//!
//! The call advances its range as it goes and swallows errors after progress, so it is repeated until the range is done,
//! and an error always speaks of the range's first page. What each errno means here:
//!
//! | errno | what is done |
//! |---|---|
//! | EINTR | again, unless the run ended; where the watchdog's time passed without progress, once more with a new root, then abandoned |
//! | EAGAIN | again after a pause that grows, until the watchdog's time has passed: abandoned |
//! | ENOENT | no memslot holds the page: skipped, on with the next |
//! | EFAULT, EHWPOISON | the page failed, on with the next |
//! | EOPNOTSUPP, ENOTTY | no second stage on this VM: skipped, now and for the rest of the run |
//! | EIO | the VM is dead: the run ends |
//! | EINVAL, ENOMEM, ENOSPC, others | the rest of the chunk failed |

use std::time::Duration;

use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Vcpu};

use crate::clock::Clock;
use crate::control::Control;
use crate::gate::Standing;
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
    /// Lose this page for the reason and go on behind it.
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
                    tally.lost(place, Stage::Second, gone, Reason::NoMemslot);
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
                rest = after(left, done);
                continue;
            }
            // A success without progress is none; it is paced like EAGAIN.
            match self.judge(result.err().unwrap_or(Errno::AGAIN), &mut patience, &mut renewed) {
                Refusal::Again => {}
                Refusal::Page(reason) => {
                    let page = GpaRange::new(left.start(), PAGE_SIZE);
                    tally.lost(place, Stage::Second, page, reason);
                    patience.progress();
                    rest = after(left, PAGE_SIZE);
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
        let pass = control.enter(Some(watched.seat()))?;
        if std::mem::replace(changes, pass.changes()) != pass.changes() {
            // Slots may have changed, and the root gone stale. Where it can't be renewed, the watchdog is left. The time
            // at the gate was not the call's.
            let _ = vcpu.renew_root();
            patience.progress();
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
        let done = Gpa::new(arg.gpa).checked_offset_from(range.start()).unwrap_or(0);
        Ok(Called::Did(done.min(size), result))
    }

    fn judge(&mut self, errno: Errno, patience: &mut Patience, renewed: &mut bool) -> Refusal {
        let why = match errno {
            Errno::INTR if !patience.is_over() => return Refusal::Again,
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
