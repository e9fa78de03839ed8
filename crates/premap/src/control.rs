//! What a run's threads share with those outside: what may end it, how far it is, and the gate to the kernel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use premap_address_space::limits::Limit;

use crate::bell::Bell;
use crate::budget::Stop;
use crate::gate::{Entrance, Gate, Pass};
use crate::interrupt::Seat;
use crate::plan::Plan;
use crate::progress::Meter;
use crate::report::{Reason, Unsupported};

/// How often one who waits looks whether the run is over, if nobody tells.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The conditions that every worker looks at between two calls.
#[derive(Debug)]
pub(crate) struct Control {
    stop: Option<Stop>,
    deadline: Option<Instant>,
    /// This run alone was stopped.
    stopped: AtomicBool,
    /// The kernel said EIO, or a worker panicked.
    dead: AtomicBool,
    /// Set once, when too little memory is left.
    short: OnceLock<Limit>,
    /// Set once, when the second stage turns out not to be had; the host stage goes on.
    unsupported: OnceLock<Unsupported>,
    pub(crate) entrance: Entrance,
    pub(crate) meter: Meter,
    pub(crate) bell: Arc<Bell>,
}

impl Control {
    /// For a run of the plan.
    pub(crate) fn new(plan: &Plan, stop: Option<Stop>, deadline: Option<Instant>, gate: &Gate) -> Self {
        let bell = Arc::new(Bell::default());
        if let Some(stop) = &stop {
            stop.tell(&bell);
        }
        Self {
            stop,
            deadline,
            stopped: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            short: OnceLock::new(),
            unsupported: OnceLock::new(),
            entrance: gate.entrance(plan.moment()),
            meter: Meter::new(plan.bytes()),
            bell,
        }
    }

    /// Why the run is over, if it is.
    pub(crate) fn ended(&self) -> Option<Reason> {
        // Relaxed: the flags publish nothing but themselves.
        if self.dead.load(Ordering::Relaxed) {
            Some(Reason::VmDead)
        } else if self.stopped.load(Ordering::Relaxed) || self.stop.as_ref().is_some_and(Stop::is_stopped) {
            Some(Reason::Stopped)
        } else if let Some(limit) = self.short.get() {
            Some(Reason::HostMemory(limit.kind))
        } else if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            Some(Reason::Deadline)
        } else {
            None
        }
    }

    /// Lets the calling thread make a call about guest memory, once the gate is open.
    ///
    /// # Errors
    /// Why the run is over.
    pub(crate) fn enter<'a>(&'a self, seat: Option<&'a Arc<Seat>>) -> Result<Pass<'a>, Reason> {
        self.entrance.enter(seat, || self.ended())
    }

    /// Why there is no second stage, if there is none.
    pub(crate) fn unsupported(&self) -> Option<Unsupported> {
        self.unsupported.get().copied()
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.bell.ring();
    }

    pub(crate) fn declare_dead(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.bell.ring();
    }

    /// Ends the run, since too little is left below a limit on memory.
    pub(crate) fn run_short(&self, limit: Limit) {
        self.short.get_or_init(|| limit);
        self.bell.ring();
    }

    /// The limit on memory that ended the run, if one did.
    pub(crate) fn short_of(&self) -> Option<&Limit> {
        self.short.get()
    }

    pub(crate) fn declare_unsupported(&self, why: Unsupported) {
        self.unsupported.get_or_init(|| why);
    }
}
