//! The functions that the VMM calls in place of the C library's.
//!
//! Each looks first whether the call concerns the library at all, and if not, passes on. Otherwise it looks before and
//! after the call; the call itself is made here, once, outside any lock. errno is put back after each look, and a panic
//! in one ends the library's work and not the VMM.
// UNSAFETY: defines C functions under the C library's names, and passes the caller's arguments on.
#![expect(unsafe_code, reason = "interposed C functions")]

use std::ffi::{c_int, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::request::Request;
use crate::watch::Before;
use crate::{descriptors, next, process, watch};

/// Stands in for the C library's `ioctl`.
///
/// That one is variadic; on every ABI of 64-bit Linux its third argument is passed just as this one's is.
///
/// # Safety
/// As for the C library's.
// SAFETY: the name is meant to be the C library's, and the function does what that one does. Unit tests leave it alone.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let pass = || {
        // SAFETY: these are our caller's own arguments.
        unsafe { next::ioctl(fd, request, argument) }
    };
    match Request::of(request) {
        None => pass(),
        Some(Request::Run) if !watch::is_mapping_due() => pass(),
        Some(_) if process::stepped_aside() => pass(),
        Some(request) => {
            let before = look(|| watch::before(request, fd));
            let value = match &before {
                Before::CalledBack(Some(page)) => page.without_entry(pass),
                Before::CalledBack(None) => {
                    // SAFETY: the C library gives a valid pointer to the calling thread's errno.
                    unsafe { *libc::__errno_location() = libc::EINTR };
                    return -1;
                }
                Before::Nothing | Before::Changing(_) => pass(),
            };
            // On success the kernel has read what `argument` points to, so it can be read.
            look(|| watch::after(before, request, fd, value, argument));
            value
        }
    }
}

/// Stands in for the C library's `close`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    if descriptors::is_watched(fd) && !process::stepped_aside() {
        look(|| watch::closing(fd));
    }
    // SAFETY: this is our caller's own argument.
    unsafe { next::close(fd) }
}

/// Does the library's work beside a call: errno stays as it was, and after a panic the library steps aside.
fn look<T: Default>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the C library gives a valid pointer to the calling thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; no other thread writes it.
    let kept = unsafe { *errno };
    // State that a panic leaves half done is not used again: the library steps aside.
    let result = catch_unwind(AssertUnwindSafe(work));
    // SAFETY: as above.
    unsafe { *errno = kept };
    result.unwrap_or_else(|panic| {
        process::step_aside(&format!("an error of premap's own: {}", process::panic_text(&*panic)));
        T::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_leave_the_library_and_errno_stays() {
        // SAFETY: the C library gives a valid pointer to the calling thread's errno.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        unsafe { *errno = 77 };
        assert!(!process::stepped_aside());
        let value: Option<u8> = look(|| {
            // Leaves another errno behind.
            // SAFETY: closing no descriptor at all only fails.
            unsafe { libc::close(-1) };
            panic!("in a test")
        });
        // SAFETY: as above.
        assert_eq!((value, unsafe { *errno }), (None, 77));
        assert!(process::stepped_aside());
    }

    #[test]
    fn calls_that_are_not_kvm_s_give_what_the_kernel_gives() {
        // SAFETY: no descriptor is -1, so the kernel reads nothing.
        assert_eq!(unsafe { ioctl(-1, 0x5401, std::ptr::null_mut()) }, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
        // SAFETY: no descriptor is -1.
        assert_eq!(unsafe { close(-1) }, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
    }
}
