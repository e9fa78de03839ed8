//! How far a run is, for those who ask while it goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::report::Stage;

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

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
