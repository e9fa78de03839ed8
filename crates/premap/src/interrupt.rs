//! Interrupting a pre-fault call: a signal to the thread that makes it, whose handler does nothing.
//!
//! A pre-fault call ends early for one thing only, a pending signal, and for that the signal must have a handler: one that
//! is ignored never becomes pending. The handler is installed once, without `SA_RESTART`, and stays; it never replaces
//! one that the program has made its own. Another copy of this library in the process is another program: each takes a
//! signal that is free, unless the caller names one.
// UNSAFETY: sigaction, pthread_sigmask and pthread_kill, none of which std or rustix offers for real-time signals.
#![expect(unsafe_code, reason = "signals to one's own threads")]

use std::ffi::c_int;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::engine::Error;

/// A signal whose handler is ours and does nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupt(c_int);

extern "C" fn nothing(_: c_int) {}

impl Interrupt {
    /// Makes sure that the signal has a handler that does nothing. Where the caller names none it is the last but one
    /// real-time signal, or the next before it that is free.
    pub(crate) fn install(signal: Option<c_int>) -> Result<Self, Error> {
        static INSTALLING: Mutex<()> = Mutex::new(());
        let _alone = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signal) = signal {
            return Self::take(signal);
        }
        for signal in (libc::SIGRTMIN()..libc::SIGRTMAX()).rev() {
            match Self::take(signal) {
                Err(Error::SignalTaken(_)) => {}
                taken => return taken,
            }
        }
        Err(Error::NoFreeSignal)
    }

    fn take(signal: c_int) -> Result<Self, Error> {
        let handler = nothing as extern "C" fn(c_int) as libc::sighandler_t;
        let is_free = |action: &libc::sigaction| action.sa_sigaction == libc::SIG_DFL;
        let current = exchange(signal, None)?;
        if current.sa_sigaction == handler {
            return Ok(Self(signal));
        }
        if !is_free(&current) {
            return Err(Error::SignalTaken(signal));
        }
        // SAFETY: all zeros is a valid sigaction: no flags (so no SA_RESTART) and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler;
        let replaced = exchange(signal, Some(&action))?;
        if !is_free(&replaced) {
            // Somebody else took it meanwhile.
            exchange(signal, Some(&replaced))?;
            return Err(Error::SignalTaken(signal));
        }
        Ok(Self(signal))
    }

    /// Its number.
    pub(crate) const fn signal(self) -> c_int {
        self.0
    }

    /// Lets the signal through to the calling thread, which may have inherited a mask that blocks it.
    pub(crate) fn unblock(self) -> Unblocked {
        let (mut set, mut before) = (MaybeUninit::<libc::sigset_t>::uninit(), MaybeUninit::uninit());
        // SAFETY: sigemptyset fills `set`, sigaddset changes it, and the mask changed is this thread's own. It can't fail for
        // a known way of changing, so that it fills `before`.
        let before = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), before.as_mut_ptr());
            before.assume_init()
        };
        Unblocked { before, _thread: PhantomData }
    }
}

/// Sets the action of a signal, if one is given, and gives the one before.
fn exchange(signal: c_int, new: Option<&libc::sigaction>) -> Result<libc::sigaction, Error> {
    let mut before = MaybeUninit::<libc::sigaction>::uninit();
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: a null new action only asks; any other is `nothing`, which is an `extern "C"` function of the right type that
    // may run at any point of any thread, or one that the process had. `before` has room for the answer.
    match unsafe { libc::sigaction(signal, new, before.as_mut_ptr()) } {
        // SAFETY: the call succeeded, so it filled `before`.
        0 => Ok(unsafe { before.assume_init() }),
        _ => Err(Error::BadSignal(signal)),
    }
}

/// The calling thread takes the signal; its mask is as before on drop.
pub(crate) struct Unblocked {
    before: libc::sigset_t,
    /// Not `Send`: a thread has a mask of its own.
    _thread: PhantomData<*const ()>,
}

impl std::fmt::Debug for Unblocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unblocked").finish_non_exhaustive()
    }
}

impl Drop for Unblocked {
    fn drop(&mut self) {
        // SAFETY: the mask was this thread's own.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
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
pub(crate) struct Seated<'a> {
    seat: &'a Seat,
    _unblocked: Unblocked,
}

impl Seat {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        Self { interrupt, thread: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seats the calling thread and lets the signal through to it.
    pub(crate) fn sit(&self) -> Seated<'_> {
        let unblocked = self.interrupt.unblock();
        // SAFETY: pthread_self has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Seated { seat: self, _unblocked: unblocked }
    }

    /// The signal that interrupts.
    pub(crate) const fn signal(&self) -> Interrupt {
        self.interrupt
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
        *self.seat.lock() = None;
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
    fn a_thread_that_works_alone_has_its_mask_back() {
        let interrupt = Interrupt::install(None).unwrap();
        let is_blocked = || {
            let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
            // SAFETY: a null set only asks; `mask` has room for the answer, and the mask is this thread's own.
            unsafe {
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr());
                libc::sigismember(mask.as_ptr(), interrupt.signal()) == 1
            }
        };
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset fills `set`; the mask changed is this thread's own.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), interrupt.signal());
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        }
        let worker = crate::watchdog::Worker::new(interrupt);
        let every = std::time::Duration::from_secs(3600);
        let watched = worker.watch_alone(std::time::Instant::now(), every).unwrap();
        assert!(!is_blocked());
        drop(watched);
        assert!(is_blocked());
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
