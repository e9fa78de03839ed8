//! Waiting for the VMs' state to change, in a way that a signal ends.
//!
//! The standard library's waits go on when a signal's handler has run, and so hide it. A vCPU's thread that waits here in
//! place of the kernel's `KVM_RUN` must learn of it: that is how a VMM calls its vCPUs back. A futex wait with a timeout
//! says EINTR after every handler, whatever the handler's flags. The operation is the one that the standard library
//! makes too, so a filter that allows locks allows this.
// UNSAFETY: asks the C library for the time.
#![expect(unsafe_code, reason = "a clock that takes no system call")]

use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};

/// A count of changes, to wait on.
#[derive(Debug, Default)]
pub(crate) struct Turn(AtomicU32);

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A handler of a signal ran on this thread.
    BySignal,
    /// A change, the time's end, or nothing at all.
    Otherwise,
}

impl Turn {
    /// The count by now. To be taken before looking at what may change.
    pub(crate) fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Wakes all who wait.
    pub(crate) fn announce(&self) {
        self.0.fetch_add(1, Ordering::Release);
        // All that can go wrong is that nobody is there.
        let _ = futex::wake(&self.0, Flags::PRIVATE, u32::MAX >> 1);
    }

    /// Waits until the count is another than `seen`, for at most so long.
    pub(crate) fn wait(&self, seen: u32, at_most: Duration) -> Woken {
        let until = Timespec::try_from(at_most).ok().and_then(|span| now()?.checked_add(span));
        match futex::wait_bitset(&self.0, Flags::PRIVATE, seen, until.as_ref(), NonZeroU32::MAX) {
            Err(Errno::INTR) => Woken::BySignal,
            _ => Woken::Otherwise,
        }
    }
}

/// The clock by which the kernel takes the limit. The C library reads it without a system call; rustix makes some before
/// it does so too.
fn now() -> Option<Timespec> {
    let mut now = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `now` has room for the time.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, now.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so it filled `now`.
    let now = unsafe { now.assume_init() };
    Some(Timespec { tv_sec: now.tv_sec, tv_nsec: now.tv_nsec })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_a_change_or_at_its_limit() {
        let turn = Turn::default();
        assert_eq!(turn.wait(turn.count(), Duration::from_millis(1)), Woken::Otherwise);
        let before = turn.count();
        turn.announce();
        // Were the change missed, this would wait for an hour.
        assert_eq!(turn.wait(before, Duration::from_secs(3_600)), Woken::Otherwise);
    }
}
