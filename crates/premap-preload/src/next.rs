//! The functions that the library stands before: what a call would have reached without it.
//!
//! They are looked up at their first use, so that other preloaded libraries keep their place. While that goes on, and
//! where it fails, the system call is made directly: that is all that the C library's functions do. So a lookup that
//! itself calls `ioctl` or `close` ends, and nothing waits.
// UNSAFETY: dlsym, calls of what it found, and system calls with the caller's own arguments.
#![expect(unsafe_code, reason = "calls through to the C library")]

use std::ffi::{CStr, c_int, c_ulong, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// A function of the C library, or of the next preloaded one.
struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
    looking: AtomicBool,
}

static IOCTL: Next = Next::new(c"ioctl");
static CLOSE: Next = Next::new(c"close");

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, found: AtomicPtr::new(ptr::null_mut()), looking: AtomicBool::new(false) }
    }

    fn get(&self) -> Option<*mut c_void> {
        let found = self.found.load(Ordering::Acquire);
        if !found.is_null() {
            return Some(found);
        }
        if self.looking.swap(true, Ordering::AcqRel) {
            return None;
        }
        // SAFETY: the name is a C string, and RTLD_NEXT is a valid handle.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.found.store(found, Ordering::Release);
        self.looking.store(false, Ordering::Release);
        (!found.is_null()).then_some(found)
    }
}

/// Calls the next `ioctl`.
///
/// # Safety
/// The arguments are ones that `ioctl` may be called with.
pub(crate) unsafe fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    type Function = unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;
    match IOCTL.get() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type in every C library for Linux; the arguments
            // are the caller's promise.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(fd, request, argument) }
        }
        None => {
            // SAFETY: the arguments are the caller's promise.
            let value = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
            // The kernel's value is an int.
            c_int::try_from(value).unwrap_or(-1)
        }
    }
}

/// Calls the next `close`.
///
/// # Safety
/// The descriptor is the caller's to close.
pub(crate) unsafe fn close(fd: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int) -> c_int;
    match CLOSE.get() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the descriptor is the caller's.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(fd) }
        }
        None => {
            // SAFETY: the descriptor is the caller's.
            let value = unsafe { libc::syscall(libc::SYS_close, fd) };
            c_int::try_from(value).unwrap_or(-1)
        }
    }
}
