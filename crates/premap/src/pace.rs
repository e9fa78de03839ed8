//! How much of the machine a run may take.
//!
//! A leaky bucket over all of a run's threads: whatever is done fills it by the time that the work *should* take at the
//! pace set, and a chunk is begun when the bucket has run empty. Time in which nothing could be done gives no credit.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::control::{Control, LOOK_EVERY};

/// How much of the machine a run may take. Whatever the pace, a chunk once begun is finished at full speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it goes.
    #[default]
    Full,
    /// At most so many of the plan's bytes a second, over all threads.
    BytesPerSecond(NonZeroU64),
    /// At most this share of one core's time in percent, over all threads: 25 is a quarter of a core, 200 are two.
    PercentOfCore(NonZeroU16),
}

/// Keeps a run to its pace.
#[derive(Debug)]
pub(crate) struct Pacer {
    pace: Pace,
    /// When the next chunk may begin.
    next: Mutex<Instant>,
    woken: Condvar,
}

impl Pacer {
    pub(crate) fn new(pace: Pace) -> Self {
        Self { pace, next: Mutex::new(Instant::now()), woken: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Instant> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a chunk may begin, or the run is over.
    pub(crate) fn wait(&self, control: &Control) {
        if self.pace == Pace::Full {
            return;
        }
        let mut next = self.lock();
        while control.ended().is_none() {
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Where one thread does all there is nobody to wake it.
            let left = left.min(LOOK_EVERY);
            (next, _) = self.woken.wait_timeout(next, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does work on so many new bytes of the plan, and charges for it.
    pub(crate) fn charge<T>(&self, bytes: u64, work: impl FnOnce() -> T) -> T {
        if self.pace == Pace::Full {
            return work();
        }
        let (begin, worked) = (Instant::now(), processor_time());
        let value = work();
        let cost = cost(self.pace, bytes, processor_time().saturating_sub(worked));
        let mut next = self.lock();
        *next = (*next).max(begin) + cost;
        value
    }

    /// Wakes those who wait, to look whether the run is over.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.woken.notify_all();
    }
}

/// How long the calling thread was on a processor so far: waiting at a closed gate, or for a disk, takes no core's time.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The time that work should have taken.
fn cost(pace: Pace, bytes: u64, took: Duration) -> Duration {
    match pace {
        Pace::Full => Duration::ZERO,
        Pace::BytesPerSecond(rate) => {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
            Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        }
        Pace::PercentOfCore(percent) => took * 100 / u32::from(percent.get()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pace: Pace, bytes: u64, took_ms: u64, expected_ms: u64) {
        assert_eq!(cost(pace, bytes, Duration::from_millis(took_ms)), Duration::from_millis(expected_ms));
    }

    #[test]
    fn a_rate_charges_for_bytes_and_a_share_for_time() {
        let rate = |bytes| Pace::BytesPerSecond(NonZeroU64::new(bytes).unwrap());
        let share = |percent| Pace::PercentOfCore(NonZeroU16::new(percent).unwrap());
        check(Pace::Full, 1 << 30, 5, 0);
        check(rate(1_000), 500, 5, 500);
        check(rate(u64::MAX), 1 << 20, 5, 0);
        assert!(cost(rate(1), u64::MAX, Duration::ZERO) > Duration::from_secs(1 << 32));
        check(share(25), 0, 5, 20);
        check(share(100), 1 << 30, 5, 5);
        check(share(200), 0, 4, 2);
    }
}
