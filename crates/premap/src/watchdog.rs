//! Watches pre-fault calls from outside and interrupts those that take too long.
//!
//! Linux 6.11 to 6.17 can spin inside the call until a signal comes: on a vCPU whose page-table root went stale, and on a
//! memslot that is being deleted. A call that takes longer than the watchdog's time, or that goes on after the run has
//! ended, is sent a signal again and again until it returns. One that was only slow returns with what it has done and is
//! simply called again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::alarm::Alarm;
use crate::interrupt::{Interrupt, Seat, Seated};

/// No call is under way.
const IDLE: u64 = u64::MAX;

/// The watchdog's view of one worker.
#[derive(Debug)]
pub(crate) struct Worker {
    seat: Arc<Seat>,
    /// When the call under way began, in nanoseconds since the run began, or [`IDLE`].
    since: AtomicU64,
}

impl Worker {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { seat: Arc::new(Seat::new(interrupt)), since: AtomicU64::new(IDLE) }
    }

    /// Watches the calling thread.
    pub(crate) fn watch(&self, begin: Instant) -> Watched<'_> {
        Watched { worker: self, begin, alarm: None, _seated: self.seat.sit() }
    }

    /// Has a timer watch the calling thread, where no other can: every call is interrupted after each such time.
    ///
    /// # Errors
    /// There is no timer.
    pub(crate) fn watch_alone(&self, begin: Instant, every: Duration) -> io::Result<Watched<'_>> {
        // The alarm, which comes second, goes first, and so the seat puts the first mask back.
        let watched = self.watch(begin);
        Ok(Watched { alarm: Some(Alarm::new(self.seat.signal(), every)?), ..watched })
    }

    /// Interrupts the worker if its call began more than `limit` ago.
    pub(crate) fn interrupt_after(&self, limit: Duration, begin: Instant) {
        // Relaxed: a call that ends or begins meanwhile takes a signal that does nothing.
        let since = self.since.load(Ordering::Relaxed);
        if since != IDLE && begin.elapsed() >= Duration::from_nanos(since).saturating_add(limit) {
            self.seat.interrupt();
        }
    }
}

/// A worker's own side: tells the watchdog when calls begin and end.
#[derive(Debug)]
pub(crate) struct Watched<'a> {
    worker: &'a Worker,
    begin: Instant,
    alarm: Option<Alarm>,
    _seated: Seated<'a>,
}

impl Watched<'_> {
    /// Where the worker can be interrupted.
    pub(crate) fn seat(&self) -> &Arc<Seat> {
        &self.worker.seat
    }

    /// Runs `call` under the watchdog's eye.
    pub(crate) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        let now = u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(IDLE - 1);
        self.worker.since.store(now, Ordering::Relaxed);
        let value = match &self.alarm {
            Some(alarm) => alarm.during(call),
            None => call(),
        };
        self.worker.since.store(IDLE, Ordering::Relaxed);
        value
    }
}
