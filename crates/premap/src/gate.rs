//! Keeps the engine's calls and the VMM's slot changes apart.
//!
//! **Protocol.** A worker passes the gate for every call about guest memory, of either stage, and is *inside* until the call
//! returns. Whoever closes the gate first says so, which keeps others from entering, then interrupts those inside until all
//! have left. The gate may be closed by many at once; it opens when the last of them is gone, and each closing is counted.
//!
//! ```text
//!   worker                            the VMM
//!   wait while closed                 closed += 1, changes += 1
//!   inside += 1, read changes         while inside > 0: interrupt, wait
//!   (new root if changes moved)       (change slots)
//!   call                              closed -= 1
//!   inside -= 1                       the last one wakes the workers
//! ```
//!
//! **Guarantee.** While a [`SlotGuard`] is held no call of the engine is under way, and every call made after it knows that
//! there was one: the vCPU's page-table root may have gone stale, on which Linux before 6.15 spins, so it is renewed first.
//! With nobody inside, the other spin of Linux before 6.18, on a slot that is being deleted, can't be met either.
//!
//! **Memory that goes.** Where a change takes memory out of the guest, the guard is told so, and no call about those addresses
//! is made any more for a plan that was made before: the host's addresses may belong to something else by then. That holds for
//! a run that is under way, and for one that begins later ([`forgotten`](crate::forgotten)).
//!
//! A signal that arrives just before its call is lost, so interrupting is repeated. The lock is held for a few
//! instructions only, and no other lock but a seat's is taken under it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use premap_address::GpaRange;

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::control::LOOK_EVERY;
use crate::forgotten::{Forgotten, Moment, Standing};
use crate::interrupt::Seat;
use crate::report::Reason;

/// How long to wait between two signals to a call that is in the way.
const INTERRUPT_EVERY: Duration = Duration::from_millis(1);

/// What a VMM closes around changes of its memslots while the engine is at work. Clones are one gate.
///
/// ```
/// # let gate = premap::Gate::new();
/// # let range = premap::GpaRange::new(premap::Gpa::new(0), 4096);
/// let guard = gate.close();
/// // KVM_SET_USER_MEMORY_REGION; and where the memory goes too:
/// guard.forget(range);
/// drop(guard);
/// ```
///
/// Closing takes no longer than the calls under way: a pre-fault is interrupted, the host stage of a chunk is not. A gate
/// without a run costs nothing, so a VMM makes one and closes it around every change of a slot.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    opened: Condvar,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Guards held or waited for.
    closed: usize,
    /// How many guards there were.
    changes: u64,
    /// Calls under way.
    inside: usize,
    /// Those of them that a signal interrupts.
    seats: Vec<Arc<Seat>>,
    forgotten: Forgotten,
}

/// Keeps the gate closed. No run that has the gate makes a call about guest memory until this is dropped.
#[derive(Debug)]
#[must_use = "the gate opens again when this is dropped"]
pub struct SlotGuard<'a>(&'a Inner);

/// A run's way through the gate.
#[derive(Debug)]
pub(crate) struct Entrance {
    gate: Gate,
    /// When the run's plan was made.
    plan: Moment,
}

/// A worker's time inside.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    entrance: &'a Entrance,
    seat: Option<&'a Arc<Seat>>,
    changes: u64,
    /// Whether something that was forgotten concerns the run.
    concerned: bool,
}

impl Gate {
    /// Makes an open gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Closes the gate, and comes back when no call of the engine is under way.
    ///
    /// Whoever waits for a run's end while holding the guard, without stopping the run, waits for ever.
    pub fn close(&self) -> SlotGuard<'_> {
        let mut state = self.0.lock();
        state.closed += 1;
        state.changes += 1;
        while state.inside > 0 {
            state.seats.iter().for_each(|seat| seat.interrupt());
            let waited = self.0.left.wait_timeout(state, INTERRUPT_EVERY);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        SlotGuard(&self.0)
    }

    /// Lets the run of a plan of that time through the gate.
    pub(crate) fn entrance(&self, plan: Moment) -> Entrance {
        Entrance { gate: self.clone(), plan }
    }
}

impl SlotGuard<'_> {
    /// Takes guest memory out of every [`Plan`](crate::Plan) that was made before: what of `range` is not mapped yet by a run
    /// with this gate is skipped, now and in runs that begin later. A plan made afterwards is newer: it may name the
    /// memory again, where it is plugged back in.
    ///
    /// To be called where memory goes with its slot, before it is unmapped from this process. So is what the guest gives
    /// back by a balloon or by reporting free pages, while a run is under way: close the gate, forget, discard
    /// (`MADV_DONTNEED`, `MADV_REMOVE`, a hole punched), open it; the run does not fill it again.
    pub fn forget(&self, range: GpaRange) {
        self.0.lock().forgotten.add(range, Moment::now());
    }
}

impl Entrance {
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// How many of the gate's closings are over. What was looked at now is older than whatever comes of those that are not.
    pub(crate) fn changes_over(&self) -> u64 {
        let state = self.gate.0.lock();
        state.changes - state.closed as u64
    }

    /// Waits until the gate is open, or the run is over, and goes inside.
    ///
    /// # Errors
    /// What `ended` says.
    pub(crate) fn enter<'a>(
        &'a self,
        seat: Option<&'a Arc<Seat>>,
        ended: impl Fn() -> Option<Reason>,
    ) -> Result<Pass<'a>, Reason> {
        let gate = &self.gate.0;
        let mut state = gate.lock();
        while state.closed > 0 {
            if let Some(why) = ended() {
                return Err(why);
            }
            // Where one thread does all there is nobody to wake it.
            let waited = gate.opened.wait_timeout(state, LOOK_EVERY);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        state.seats.extend(seat.cloned());
        let concerned = state.forgotten.concerns(self.plan);
        Ok(Pass { entrance: self, seat, changes: state.changes, concerned })
    }

    /// Wakes those who wait to enter, to look whether their run is over.
    pub(crate) fn wake(&self) {
        drop(self.gate.0.lock());
        self.gate.0.opened.notify_all();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// How often the gate was closed before this entry.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// How the range's first bytes stand: what is said holds until the worker leaves.
    pub(crate) fn standing(&self, range: GpaRange) -> Standing {
        if !self.concerned {
            return Standing::There(range.bytes());
        }
        self.entrance.gate.0.lock().forgotten.standing(range, self.entrance.plan)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let gate = &self.entrance.gate.0;
        let mut state = gate.lock();
        state.inside -= 1;
        if let Some(seat) = self.seat {
            state.seats.retain(|other| !Arc::ptr_eq(other, seat));
        }
        if state.inside == 0 && state.closed > 0 {
            gate.left.notify_all();
        }
    }
}

impl Drop for SlotGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed -= 1;
        if state.closed == 0 {
            self.0.opened.notify_all();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_model;
