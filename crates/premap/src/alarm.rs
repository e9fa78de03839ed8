//! Interrupts calls of the calling thread by a timer: for who has no other thread that could.
//!
//! The timer belongs to the kernel and is set only while a call is under way, so that nothing else on the thread is interrupted.
//! A call that goes on is sent a signal again and again; one that was only slow returns with what it has done and is called
//! again, so a short time costs little.
// UNSAFETY: POSIX timers, which neither std nor rustix offers.
#![expect(unsafe_code, reason = "timers that signal one's own thread")]

use std::ffi::c_long;
use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use crate::interrupt::{Interrupt, Unblocked};

/// A timer that interrupts calls of the thread that made it, and of no other.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: libc::timer_t,
    every: libc::timespec,
    /// Not `Send`: this is the thread that is signalled.
    _unblocked: Unblocked,
}

impl Alarm {
    /// Interrupts a call once it took so long, and again after each such time.
    ///
    /// # Errors
    /// The kernel has no timer for this process, or a filter forbids it.
    pub(crate) fn new(interrupt: Interrupt, every: Duration) -> io::Result<Self> {
        let unblocked = interrupt.unblock();
        // SAFETY: all zeros is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = interrupt.signal();
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = MaybeUninit::<libc::timer_t>::uninit();
        // SAFETY: both point to what the call reads and writes; the thread is alive for as long as the timer, which never
        // leaves it.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so it filled `timer`.
        let timer = unsafe { timer.assume_init() };
        let every = libc::timespec {
            tv_sec: libc::time_t::try_from(every.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: c_long::from(every.subsec_nanos()),
        };
        Ok(Self { timer, every, _unblocked: unblocked })
    }

    /// Runs `call`, which the timer interrupts.
    pub(crate) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.set(self.every);
        let _silence = Silence(self);
        call()
    }

    fn set(&self, every: libc::timespec) {
        let times = libc::itimerspec { it_interval: every, it_value: every };
        // SAFETY: the timer is ours, and the times are valid. It fails for neither.
        unsafe { libc::timer_settime(self.timer, 0, &raw const times, std::ptr::null_mut()) };
    }
}

/// Stops the timer on drop, also where the call panics.
struct Silence<'a>(&'a Alarm);

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        self.0.set(libc::timespec { tv_sec: 0, tv_nsec: 0 });
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and this is its last use.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::thread::{NanosleepRelativeResult, Timespec, nanosleep};

    use super::*;

    #[test]
    fn only_what_takes_too_long_is_interrupted() {
        let alarm = Alarm::new(Interrupt::install(None).unwrap(), Duration::from_millis(2)).unwrap();
        let sleep = |seconds, nanos| nanosleep(&Timespec { tv_sec: seconds, tv_nsec: nanos });
        let begin = Instant::now();
        let interrupted = alarm.during(|| sleep(3600, 0));
        assert!(matches!(interrupted, NanosleepRelativeResult::Interrupted(_)));
        assert!(begin.elapsed() >= Duration::from_millis(2));
        // Outside a call nothing is, nor where one panicked.
        let panicked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| alarm.during(|| panic!("as asked"))));
        assert!(panicked.is_err());
        assert!(matches!(sleep(0, 20_000_000), NanosleepRelativeResult::Ok));
    }
}
