//! Signals, as a long ioctl sees them.
//!
//! The kernel runs no handler while a thread is inside an ioctl: a signal makes `signal_pending()` true, the ioctl ends
//! with EINTR or with what it has done so far, and the handler runs on the way out. Here the same comes of a signal mask:
//!
//! 1. [`Held::new`] blocks every signal but those that a fault raises, so that no handler runs inside.
//! 2. [`Held::pending`] says whether one waits that would have been delivered: not blocked before, and not ignored.
//! 3. Dropping [`Held`] restores the mask, and the handler runs there.
//!
//! A signal to the whole process may meanwhile go to another thread that has it unblocked. That is true of the kernel's
//! own ioctl too.
// UNSAFETY: the C library's signal calls. Each block argues that what it is given is initialised and outlives the call.
#![expect(unsafe_code, reason = "signal masks")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

/// Signals that a fault raises in the thread itself: blocked, they would kill the process.
const SYNCHRONOUS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// Signals whose default action is to do nothing.
const IGNORED_BY_DEFAULT: [libc::c_int; 4] = [libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH, libc::SIGCONT];

/// The calling thread's signals, held back until this is dropped.
pub(crate) struct Held {
    before: libc::sigset_t,
    /// The mask is the thread's, so this may not go to another.
    thread: PhantomData<*const ()>,
}

impl Held {
    pub(crate) fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: sigfillset initialises the whole set behind its pointer; sigdelset and pthread_sigmask are given that
        // set, and pthread_sigmask initialises `before`. None keeps a pointer. They fail only for numbers that are no
        // signals or no way of masking, which the constants are.
        let before = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            for signal in SYNCHRONOUS {
                libc::sigdelset(all.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
            before.assume_init()
        };
        Self { before, thread: PhantomData }
    }

    /// Whether a signal waits that would have been delivered by now.
    pub(crate) fn pending(&self) -> bool {
        let mut pending = MaybeUninit::uninit();
        // SAFETY: sigpending initialises the set and keeps no pointer to it; given a valid pointer it can't fail.
        let pending = unsafe {
            libc::sigpending(pending.as_mut_ptr());
            pending.assume_init()
        };
        (1..=libc::SIGRTMAX()).any(|signal| {
            contains(&pending, signal) && !contains(&self.before, signal) && !is_ignored(signal)
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the set was initialised in `new`, by the same thread, since `Held` is not `Send`; the old mask is not
        // asked for. Handlers of what waits run here, as they would on the way out of an ioctl.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut()) };
    }
}

/// Sends the calling thread the SIGBUS of a poisoned page, as the kernel does when KVM meets one.
pub(crate) fn raise_poisoned(page: premap_address::Hva) {
    /// `BUS_MCEERR_AR` of `asm-generic/siginfo.h`: the data is needed now.
    const ACTION_REQUIRED: libc::c_int = 4;

    /// The head of `siginfo_t` with the fields of a fault; the kernel reads all 128 bytes.
    #[repr(C)]
    struct FaultInfo {
        signo: libc::c_int,
        errno: libc::c_int,
        code: libc::c_int,
        address: u64,
        lsb: libc::c_short,
        rest: [u8; 102],
    }
    const { assert!(size_of::<FaultInfo>() == size_of::<libc::siginfo_t>()) };

    let info = FaultInfo {
        signo: libc::SIGBUS,
        errno: 0,
        code: ACTION_REQUIRED,
        address: page.raw(),
        lsb: 12,
        rest: [0; 102],
    };
    // SAFETY: rt_tgsigqueueinfo reads one siginfo_t, whose size and leading fields FaultInfo has; a process may send itself
    // any code. The numbers name the calling thread itself.
    unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            libc::SIGBUS,
            &raw const info,
        );
    }
}

fn contains(set: &libc::sigset_t, signal: libc::c_int) -> bool {
    // SAFETY: the set is initialised and only read.
    unsafe { libc::sigismember(set, signal) == 1 }
}

/// Whether the process does nothing on this signal. The kernel keeps even those while they are blocked.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with no new action sigaction only writes the present one behind its pointer; zeroed bytes are a valid value
    // of the struct, so it is initialised even if the call refuses the number.
    let action = unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
        || (action.sa_sigaction == libc::SIG_DFL && IGNORED_BY_DEFAULT.contains(&signal))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use super::*;

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn count(_: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    /// Sends a signal to the calling thread alone.
    fn raise(signal: libc::c_int) {
        // SAFETY: raise takes a number; the handlers installed below only count.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    fn handle(signal: libc::c_int, handler: libc::sighandler_t) {
        // SAFETY: installs a handler that only counts, or SIG_IGN or SIG_DFL, for a signal that no other test uses.
        assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
    }

    #[test]
    fn a_handler_runs_after_and_not_inside() {
        handle(libc::SIGRTMIN() + 1, count as *const () as libc::sighandler_t);
        let held = Held::new();
        assert!(!held.pending());
        raise(libc::SIGRTMIN() + 1);
        assert!(held.pending());
        assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
        drop(held);
        assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    }

    static POISONED: AtomicU64 = AtomicU64::new(0);

    extern "C" fn poisoned(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo_t, here of a SIGBUS, which has an address.
        let (code, address) = unsafe { ((*info).si_code, (*info).si_addr()) };
        // BUS_MCEERR_AR
        if code == 4 {
            POISONED.store(address.addr() as u64, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_poisoned_page_is_told_by_sigbus_with_its_address_even_while_signals_are_held() {
        // SAFETY: zeroed bytes are a valid sigaction, the handler stores to an atomic only, and the one that was there
        // before is put back; all pointers are to locals that outlive the calls.
        unsafe {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            action.sa_sigaction = poisoned as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO;
            let mut before = MaybeUninit::uninit();
            assert_eq!(libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr()), 0);
            let held = Held::new();
            raise_poisoned(premap_address::Hva::new(0x1234_5000));
            drop(held);
            libc::sigaction(libc::SIGBUS, before.as_ptr(), ptr::null_mut());
        }
        assert_eq!(POISONED.load(Ordering::Relaxed), 0x1234_5000);
    }

    #[test]
    fn ignored_signals_and_those_blocked_before_interrupt_nothing() {
        handle(libc::SIGRTMIN() + 2, libc::SIG_IGN);
        let held = Held::new();
        raise(libc::SIGRTMIN() + 2);
        raise(libc::SIGURG);
        assert!(!held.pending());
        let nested = Held::new();
        raise(libc::SIGRTMIN() + 3);
        assert!(!nested.pending(), "it was blocked before");
        assert!(held.pending());
        drop(nested);
        // Its default action would end the process when the mask is restored.
        handle(libc::SIGRTMIN() + 3, libc::SIG_IGN);
        drop(held);
    }
}
