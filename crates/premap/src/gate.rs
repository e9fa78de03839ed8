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
//! A signal that arrives just before its call is lost, so interrupting is repeated. The lock is held for a few
//! instructions only, and no other lock but a seat's is taken under it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::interrupt::Seat;
use crate::report::Reason;

/// How long to wait between two signals to a call that is in the way.
const INTERRUPT_EVERY: Duration = Duration::from_millis(1);

/// What a VMM closes around changes of its memslots while the engine is at work. Clones are one gate.
///
/// ```
/// # let gate = premap::Gate::new();
/// let guard = gate.close();
/// // KVM_SET_USER_MEMORY_REGION, munmap, ...
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
}

/// Keeps the gate closed. No run that has the gate makes a call about guest memory until this is dropped.
#[derive(Debug)]
#[must_use = "the gate opens again when this is dropped"]
pub struct SlotGuard<'a>(&'a Inner);

/// A worker's time inside.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Inner,
    seat: Option<&'a Arc<Seat>>,
    changes: u64,
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

    /// How often the gate was closed so far.
    pub(crate) fn changes(&self) -> u64 {
        self.0.lock().changes
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
        let mut state = self.0.lock();
        while state.closed > 0 {
            if let Some(why) = ended() {
                return Err(why);
            }
            state = self.0.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        state.seats.extend(seat.cloned());
        Ok(Pass { gate: &self.0, seat, changes: state.changes })
    }

    /// Wakes those who wait to enter, to look whether their run is over.
    pub(crate) fn wake(&self) {
        drop(self.0.lock());
        self.0.opened.notify_all();
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
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.inside -= 1;
        if let Some(seat) = self.seat {
            state.seats.retain(|other| !Arc::ptr_eq(other, seat));
        }
        if state.inside == 0 && state.closed > 0 {
            self.gate.left.notify_all();
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

/// The protocol under every interleaving; `cargo xtask test --only loom`.
#[cfg(all(test, loom))]
mod loom_model {
    // UNSAFETY: a cell that loom checks.
    #![expect(unsafe_code, reason = "loom's cells are unsafe to reach into")]

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    use super::*;

    /// What KVM has of slots: read by calls, written by changes. Loom fails the model where the two meet.
    struct Slots(UnsafeCell<u64>);

    // SAFETY: loom checks each access to the cell.
    unsafe impl Send for Slots {}
    // SAFETY: as above.
    unsafe impl Sync for Slots {}

    impl Slots {
        fn call(&self) -> u64 {
            // SAFETY: loom checks that nobody writes the cell meanwhile.
            self.0.with(|slots| unsafe { *slots })
        }

        fn change(&self) {
            // SAFETY: loom checks that nobody else is in the cell.
            self.0.with_mut(|slots| unsafe { *slots += 1 });
        }
    }

    /// So many workers make two calls each while so many VMM threads change the slots once, one after the other: KVM has a
    /// lock of its own for that.
    fn check(workers: usize, changers: usize) {
        loom::model(move || {
            let gate = Gate::new();
            let slots = loom::sync::Arc::new((Slots(UnsafeCell::new(0)), loom::sync::Mutex::new(())));
            let mut threads = Vec::new();
            for _ in 0..workers {
                let (gate, slots) = (gate.clone(), slots.clone());
                threads.push(thread::spawn(move || {
                    for _ in 0..2 {
                        let pass = gate.enter(None, || None).expect("the run goes on");
                        // Whoever sees a change knows that there was one.
                        assert!(slots.0.call() <= pass.changes());
                    }
                }));
            }
            for _ in 0..changers {
                let (gate, slots) = (gate.clone(), slots.clone());
                threads.push(thread::spawn(move || {
                    let _guard = gate.close();
                    let _alone = slots.1.lock();
                    slots.0.change();
                }));
            }
            for thread in threads {
                thread.join().expect("no thread of the model panics");
            }
            let pass = gate.enter(None, || None).expect("the gate is open");
            assert_eq!((slots.0.call(), pass.changes()), (changers as u64, changers as u64));
        });
    }

    #[test]
    fn calls_and_changes_never_meet_and_nobody_waits_for_ever() {
        check(2, 1);
    }

    #[test]
    fn many_may_close_the_gate_at_once() {
        check(1, 2);
    }

    #[test]
    fn a_run_that_ends_leaves_a_closed_gate() {
        loom::model(|| {
            let gate = Gate::new();
            let over = loom::sync::Arc::new(AtomicBool::new(false));
            let guard = gate.close();
            let worker = {
                let (gate, over) = (gate.clone(), over.clone());
                thread::spawn(move || {
                    let ended = || over.load(Ordering::Relaxed).then_some(Reason::Stopped);
                    gate.enter(None, ended).map(drop)
                })
            };
            over.store(true, Ordering::Relaxed);
            gate.wake();
            assert_eq!(worker.join().expect("the worker does not panic"), Err(Reason::Stopped));
            drop(guard);
        });
    }
}
