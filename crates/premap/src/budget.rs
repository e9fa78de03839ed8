//! Limits on a run: how much, until when, and a handle to end it from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How far a run may go. What it does not reach is in the report, in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    /// At most this many bytes of the plan are begun.
    pub bytes: Option<u64>,
    /// No call is begun after this moment, and a pre-fault call under way is interrupted.
    pub deadline: Option<Instant>,
}

/// Ends a run from any thread. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Makes a handle that has not been used yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every run that has this handle, now and later. A pre-fault call under way is interrupted.
    pub fn stop(&self) {
        // Relaxed: the flag publishes nothing but itself.
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`stop`](Self::stop) was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
