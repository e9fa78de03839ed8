//! The functions by which a process runs another program in its place: the library looks whether it comes along.
//!
//! Those that take their arguments one by one, and those that make a child first, are not looked at.
// UNSAFETY: defines C functions under the C library's names, and passes the caller's arguments on.
#![expect(unsafe_code, reason = "interposed C functions")]

use std::ffi::{c_char, c_int};

use crate::interpose::look;
use crate::next::Strings;
use crate::{absence, next};

unsafe extern "C" {
    /// The process's own environment.
    static environ: Strings;
}

fn own_environment() -> Strings {
    // SAFETY: the C library has it from the process's begin; who changes it while another thread runs a program is at
    // fault without the library too.
    unsafe { environ }
}

/// Stands in for the C library's `execve`.
///
/// # Safety
/// As for the C library's.
// SAFETY: the name is meant to be the C library's, and the function does what that one does. Unit tests leave it alone.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn execve(path: *const c_char, arguments: Strings, environment: Strings) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe {
        look(|| absence::leaving(path, environment));
        next::execve(path, arguments, environment)
    }
}

/// Stands in for the C library's `execv`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn execv(path: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe { execve(path, arguments, own_environment()) }
}

/// Stands in for the C library's `execvpe`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn execvpe(file: *const c_char, arguments: Strings, environment: Strings) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe {
        look(|| absence::leaving(file, environment));
        next::execvpe(file, arguments, environment)
    }
}

/// Stands in for the C library's `execvp`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn execvp(file: *const c_char, arguments: Strings) -> c_int {
    // SAFETY: these are our caller's own arguments.
    unsafe { execvpe(file, arguments, own_environment()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_no_program() {
        let arguments = [c"x".as_ptr(), std::ptr::null()];
        let check = |value: c_int| {
            assert_eq!((value, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOENT)));
        };
        // SAFETY: the strings end with zeros, the lists with nulls.
        unsafe {
            check(execv(c"/no/such/program".as_ptr(), arguments.as_ptr()));
            check(execvp(c"no-such-program".as_ptr(), arguments.as_ptr()));
        }
    }
}
