//! Limits on a run: how much, until when, and a handle to end it from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use crate::bell::Bell;

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
pub struct Stop(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    /// Those who watch the runs that have this handle.
    watchers: Mutex<Vec<Weak<Bell>>>,
}

impl Stop {
    /// Makes a handle that has not been used yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every run that has this handle, now and later. A pre-fault call under way is interrupted.
    pub fn stop(&self) {
        // Relaxed: the flag publishes nothing but itself, and the lock orders it with a watcher that comes just now.
        self.0.stopped.store(true, Ordering::Relaxed);
        let watchers = self.0.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().filter_map(Weak::upgrade).for_each(|bell| bell.ring());
    }

    /// Whether [`stop`](Self::stop) was called.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Relaxed)
    }

    /// Has the bell rung when the handle is used.
    pub(crate) fn tell(&self, bell: &Arc<Bell>) {
        let mut watchers = self.0.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(bell));
    }
}
