//! Child processes that share this one's memory.
// UNSAFETY: fork in a process with threads: the child does nothing but what is safe in a signal handler, and exits.
#![expect(unsafe_code, reason = "fork")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test file uses a part of it")]

/// A child that waits to be killed.
pub(crate) struct Child(libc::pid_t);

pub(crate) fn child() -> Child {
    // SAFETY: the child only sleeps; pause is async-signal-safe.
    match unsafe { libc::fork() } {
        0 => loop {
            // SAFETY: as above.
            unsafe { libc::pause() };
        },
        pid => {
            assert!(pid > 0, "fork failed");
            Child(pid)
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not waited for yet, so the number is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}
