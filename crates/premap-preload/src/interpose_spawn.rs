//! The functions that make a child for another program at once, as Rust's `Command` and GLib do it: where one fails for want
//! of a thread, the VMM has the library's.
// UNSAFETY: defines C functions under the C library's names, and passes the caller's arguments on.
#![expect(unsafe_code, reason = "interposed C functions")]

use std::ffi::{c_char, c_int};

use crate::interpose::yielding_threads;
use crate::next::{self, Spawn, Strings};

/// Stands in for the C library's `posix_spawn`.
///
/// # Safety
/// As for the C library's.
// SAFETY: the name is meant to be the C library's, and the function does what that one does. Unit tests leave it alone.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn posix_spawn(
    child: *mut libc::pid_t,
    path: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe { spawn(Spawn::Path, child, path, actions, attributes, arguments, environment) }
}

/// Stands in for the C library's `posix_spawnp`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn posix_spawnp(
    child: *mut libc::pid_t,
    file: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe { spawn(Spawn::InPath, child, file, actions, attributes, arguments, environment) }
}

/// # Safety
/// As for the C library's functions.
unsafe fn spawn(
    which: Spawn,
    child: *mut libc::pid_t,
    program: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    yielding_threads(
        || {
            // SAFETY: these are our caller's own arguments; a call that failed has made no child.
            unsafe { next::spawn(which, child, program, actions, attributes, arguments, environment) }
        },
        |value| *value == libc::EAGAIN,
    )
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn children_are_made_and_a_program_that_is_not_there_is_none() {
        let arguments = [c"true".as_ptr(), ptr::null()];
        let (mut child, mut status) = (0, -1);
        // SAFETY: the strings end with zeros, the lists with nulls, and the child is waited for once.
        unsafe {
            let (no, none) = (ptr::null(), arguments.as_ptr().add(1));
            let missing = c"/no/such/program".as_ptr();
            assert_eq!(posix_spawn(&raw mut child, missing, no, ptr::null(), none, none), libc::ENOENT);
            let program = c"true".as_ptr();
            assert_eq!(posix_spawnp(&raw mut child, program, no, ptr::null(), arguments.as_ptr(), none), 0);
            assert_eq!((libc::waitpid(child, &raw mut status, 0), status), (child, 0));
        }
    }
}
