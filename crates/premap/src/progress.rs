//! How far a run is, for those who ask while it goes on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::report::Stage;

/// The shortest time between two calls of a progress callback.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The plan's bytes.
    pub asked: u64,
    /// Bytes that have gone through the host stage, mapped or not.
    pub host: u64,
    /// Bytes that have gone through the second stage, mapped or not.
    pub second: u64,
    /// Since the run began.
    pub elapsed: Duration,
}

/// Counts what goes through the stages.
#[derive(Debug)]
pub(crate) struct Meter {
    asked: u64,
    begin: Instant,
    through: [AtomicU64; 2],
}

impl Meter {
    pub(crate) fn new(asked: u64) -> Self {
        Self { asked, begin: Instant::now(), through: [AtomicU64::new(0), AtomicU64::new(0)] }
    }

    /// When the run began.
    pub(crate) fn begin(&self) -> Instant {
        self.begin
    }

    /// How long ago the run began.
    pub(crate) fn wall_ns(&self) -> u64 {
        nanos(self.begin.elapsed())
    }

    pub(crate) fn pass(&self, stage: Stage, bytes: u64) {
        self.through[stage as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Progress {
        let [host, second] = [0, 1].map(|stage: usize| self.through[stage].load(Ordering::Relaxed));
        Progress { asked: self.asked, host, second, elapsed: self.begin.elapsed() }
    }
}

/// A caller's callback, that is told how far a run is.
pub(crate) struct Told<F> {
    callback: F,
    last: Instant,
    panic: Option<Box<dyn Any + Send>>,
}

impl<F: FnMut(&Progress)> Told<F> {
    pub(crate) fn new(callback: F) -> Self {
        Self { callback, last: Instant::now(), panic: None }
    }

    /// Tells, unless that was done a moment ago.
    pub(crate) fn tell(&mut self, control: &Control) {
        if self.last.elapsed() >= PROGRESS_EVERY {
            self.last(control);
        }
    }

    /// Tells. A panic of the callback's stops the run, whose threads need somebody to watch them to their end.
    pub(crate) fn last(&mut self, control: &Control) {
        if self.panic.is_none() {
            let call = AssertUnwindSafe(|| (self.callback)(&control.meter.read()));
            if let Err(panic) = catch_unwind(call) {
                self.panic = Some(panic);
                control.stop();
            }
        }
        self.last = Instant::now();
    }

    /// Lets a panic go on, if there was one.
    pub(crate) fn end(self) {
        if let Some(panic) = self.panic {
            resume_unwind(panic);
        }
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
