//! What may end a run before its plan is done.

use std::sync::OnceLock;
use std::time::Instant;

use crate::budget::Stop;
use crate::report::{Reason, Unsupported};

/// The conditions that every worker looks at between two calls.
#[derive(Debug, Default)]
pub(crate) struct Control {
    stop: Option<Stop>,
    deadline: Option<Instant>,
    /// Set once, when the kernel says EIO.
    dead: OnceLock<()>,
    /// Set once, when the second stage turns out not to be had; the host stage goes on.
    unsupported: OnceLock<Unsupported>,
}

impl Control {
    pub(crate) fn new(stop: Option<Stop>, deadline: Option<Instant>) -> Self {
        Self { stop, deadline, ..Self::default() }
    }

    /// Why the run is over, if it is.
    pub(crate) fn ended(&self) -> Option<Reason> {
        if self.dead.get().is_some() {
            Some(Reason::VmDead)
        } else if self.stop.as_ref().is_some_and(Stop::is_stopped) {
            Some(Reason::Stopped)
        } else if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            Some(Reason::Deadline)
        } else {
            None
        }
    }

    /// Why there is no second stage, if there is none.
    pub(crate) fn unsupported(&self) -> Option<Unsupported> {
        self.unsupported.get().copied()
    }

    pub(crate) fn declare_dead(&self) {
        self.dead.get_or_init(|| ());
    }

    pub(crate) fn declare_unsupported(&self, why: Unsupported) {
        self.unsupported.get_or_init(|| why);
    }
}
