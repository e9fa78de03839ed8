//! How long a range may go without progress.

use std::time::{Duration, Instant};

use crate::control::Control;
use crate::report::Reason;

const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// Counts the time since the last progress, and paces retries.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    since: Instant,
    pause: Duration,
}

impl Patience {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, since: Instant::now(), pause: FIRST_PAUSE }
    }

    /// Starts anew after progress.
    pub(crate) fn progress(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Leaves a time out of account that was spent waiting for something else.
    pub(crate) fn excuse(&mut self, time: Duration) {
        self.since += time;
    }

    /// Whether the limit has passed without progress.
    pub(crate) fn is_over(&self) -> bool {
        self.since.elapsed() >= self.limit
    }

    /// Waits a little longer than the last time.
    ///
    /// # Errors
    /// The reason to give up: the run ended, or the limit passed.
    pub(crate) fn back_off(&mut self, control: &Control) -> Result<(), Reason> {
        if let Some(why) = control.ended() {
            return Err(why);
        }
        if self.is_over() {
            return Err(Reason::Busy);
        }
        self.pause();
        Ok(())
    }

    /// Waits a little longer than the last time, since progress was made.
    pub(crate) fn pause(&mut self) {
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}
