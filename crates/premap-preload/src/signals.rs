//! Keeping signals away from the library's own thread.
// UNSAFETY: sigfillset and pthread_sigmask.
#![expect(unsafe_code, reason = "the calling thread's signal mask")]

use std::mem::MaybeUninit;

/// The calling thread's mask as it was; put back on drop.
pub(crate) struct Blocked(libc::sigset_t);

/// Blocks every signal on the calling thread, and so on the threads that it starts.
pub(crate) fn block_all() -> Blocked {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigfillset fills `all`; pthread_sigmask reads it, and writes `before`, which is all zeros (an empty set)
    // otherwise. The mask is this thread's own.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        Blocked(before.assume_init())
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the mask was filled by pthread_sigmask, on this thread: the type holds a raw set and is never sent.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
