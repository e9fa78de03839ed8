//! A child process that shares this one's descriptors, and not its memory.
// UNSAFETY: fork in a process with threads: the child does nothing but what is safe in a signal handler, and exits.
#![expect(unsafe_code, reason = "fork")]

/// Whether `check` holds in a child. It must neither allocate nor take a lock that another thread may hold.
///
/// # Panics
/// If there can be no child.
pub(crate) fn in_child(check: impl FnOnce() -> bool) -> bool {
    // SAFETY: `check` is asked to do no more than what is safe after fork; then the child exits without unwinding.
    match unsafe { libc::fork() } {
        0 => {
            let status = i32::from(!check());
            // SAFETY: _exit has no conditions.
            unsafe { libc::_exit(status) }
        }
        pid => {
            assert!(pid > 0, "fork failed");
            let mut status = -1;
            // SAFETY: the child is ours, and the status is written to a local.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            status == 0
        }
    }
}
