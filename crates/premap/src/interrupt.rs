//! Interrupting a pre-fault call: a signal to the thread that makes it, whose handler does nothing.
//!
//! A pre-fault call ends early for one thing only, a pending signal, and for that the signal must have a handler: one that
//! is ignored never becomes pending. The handler is installed once, without `SA_RESTART`, and stays; it never replaces
//! one that the program has made its own.
// UNSAFETY: sigaction, pthread_sigmask and pthread_kill, none of which std or rustix offers for real-time signals.
#![expect(unsafe_code, reason = "signals to one's own threads")]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::Error;

/// A signal whose handler is ours and does nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupt(c_int);

extern "C" fn nothing(_: c_int) {}

impl Interrupt {
    /// Makes sure that the signal has a handler that does nothing; the default is a late real-time signal.
    pub(crate) fn install(signal: Option<c_int>) -> Result<Self, Error> {
        static INSTALLING: Mutex<()> = Mutex::new(());
        let _alone = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        let signal = signal.unwrap_or_else(|| libc::SIGRTMAX() - 1);
        let handler = nothing as extern "C" fn(c_int) as libc::sighandler_t;
        let mut current = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: a null new action only asks; `current` has room for the answer.
        if unsafe { libc::sigaction(signal, std::ptr::null(), current.as_mut_ptr()) } != 0 {
            return Err(Error::BadSignal(signal));
        }
        // SAFETY: the call succeeded, so it filled `current`.
        let current = unsafe { current.assume_init() };
        if current.sa_sigaction == handler {
            return Ok(Self(signal));
        }
        if current.sa_sigaction != libc::SIG_DFL {
            return Err(Error::SignalTaken(signal));
        }
        // SAFETY: all zeros is a valid sigaction: no flags (so no SA_RESTART) and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler;
        // SAFETY: the handler is an `extern "C"` function of the right type that does nothing, so it may run at any point
        // of any thread.
        match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
            0 => Ok(Self(signal)),
            _ => Err(Error::BadSignal(signal)),
        }
    }

    /// Lets the signal through to the calling thread, which may have inherited a mask that blocks it.
    fn unblock(self) {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset fills `set`, sigaddset changes it, and the mask changed is this thread's own.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
        }
    }
}

/// Where a worker thread sits, so that another can interrupt it.
#[derive(Debug)]
pub(crate) struct Seat {
    interrupt: Interrupt,
    thread: Mutex<Option<libc::pthread_t>>,
}

/// Keeps the calling thread in its [`Seat`]; it leaves on drop.
#[derive(Debug)]
pub(crate) struct Seated<'a>(&'a Seat);

impl Seat {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { interrupt, thread: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seats the calling thread and lets the signal through to it.
    pub(crate) fn sit(&self) -> Seated<'_> {
        self.interrupt.unblock();
        // SAFETY: pthread_self has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Seated(self)
    }

    /// Interrupts the thread in this seat, if there is one.
    pub(crate) fn interrupt(&self) {
        if let Some(thread) = *self.lock() {
            // SAFETY: the thread is alive: it empties the seat before it ends, and can't while we hold the seat's lock.
            unsafe { libc::pthread_kill(thread, self.interrupt.0) };
        }
    }
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_of_the_program_is_left_alone() {
        let signal = libc::SIGRTMAX() - 5;
        extern "C" fn theirs(_: c_int) {}
        // SAFETY: all zeros is a valid sigaction, and `theirs` does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = theirs as extern "C" fn(c_int) as libc::sighandler_t;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
        assert!(
            matches!(Interrupt::install(Some(signal)), Err(Error::SignalTaken(taken)) if taken == signal)
        );
        assert!(matches!(Interrupt::install(Some(-1)), Err(Error::BadSignal(-1))));
    }

    #[test]
    fn installing_twice_is_one_handler_and_an_empty_seat_takes_no_signal() {
        let interrupt = Interrupt::install(None).unwrap();
        Interrupt::install(None).unwrap();
        let seat = Seat::new(interrupt);
        drop(seat.sit());
        seat.interrupt();
    }
}
