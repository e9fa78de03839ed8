//! The functions that the VMM calls in place of the C library's.
//!
//! Each looks first whether the call concerns the library at all, and if not, passes on. Otherwise it looks before and
//! after the call; the call itself is made here, once, outside any lock. errno is put back after each look, and a panic
//! in one ends the library's work and not the VMM.
// UNSAFETY: defines C functions under the C library's names, and passes the caller's arguments on.
#![expect(unsafe_code, reason = "interposed C functions")]

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::request::Request;
use crate::watch::Before;
use crate::{closing, descriptors, helper, next, process, watch};

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
        Some(Request::Run) if !watch::is_mapping_due() || process::stepped_aside() => {
            yielding_threads(pass, is_run_short)
        }
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
                Before::Nothing if request == Request::Run => yielding_threads(pass, is_run_short),
                Before::Nothing | Before::Changing(_) | Before::Registering(_) => pass(),
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
    closing(fd..=fd, None, || {
        // SAFETY: this is our caller's own argument.
        unsafe { next::close(fd) }
    })
}

/// Stands in for the C library's `close_range`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let pass = || {
        // SAFETY: these are our caller's own arguments.
        unsafe { next::close_range(first, last, flags) }
    };
    // Marked for a later exec, they are still open.
    if flags & libc::CLOSE_RANGE_CLOEXEC.cast_signed() != 0 {
        return pass();
    }
    let number = |fd| c_int::try_from(fd).unwrap_or(c_int::MAX);
    closing(number(first)..=number(last), None, pass)
}

/// Stands in for the C library's `dup2`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    closing(new..=new, Some(old), || {
        // SAFETY: these are our caller's own arguments.
        unsafe { next::dup2(old, new) }
    })
}

/// Stands in for the C library's `dup3`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    closing(new..=new, Some(old), || {
        // SAFETY: these are our caller's own arguments.
        unsafe { next::dup3(old, new, flags) }
    })
}

/// Makes a call that closes the descriptors of a range, or puts a copy of another in one's place.
fn closing(fds: RangeInclusive<c_int>, replaced_by: Option<c_int>, call: impl FnOnce() -> c_int) -> c_int {
    // The library's threads close their own, which may have numbers that the VMM's had until just now.
    if helper::is_own_thread() {
        return call();
    }
    let mut watched = descriptors::watched(fds).peekable();
    // A descriptor put in its own place stays what it is.
    if watched.peek().is_none() || watched.peek() == replaced_by.as_ref() || process::stepped_aside() {
        return call();
    }
    let before = look(|| closing::before(watched, replaced_by));
    let value = call();
    look(|| closing::after(before));
    value
}

/// Stands in for the C library's `pthread_create`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: next::Start,
    argument: *mut c_void,
) -> c_int {
    yielding_threads(
        || {
            // SAFETY: these are our caller's own arguments; a call that failed has used none of them.
            unsafe { next::pthread_create(thread, attributes, start, argument) }
        },
        |value| *value == libc::EAGAIN,
    )
}

/// Stands in for the C library's `fork`.
///
/// # Safety
/// As for the C library's.
// SAFETY: as above.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn fork() -> libc::pid_t {
    yielding_threads(
        || {
            // SAFETY: it is our caller who forks.
            unsafe { next::fork() }
        },
        |value| *value == -1 && errno() == libc::EAGAIN,
    )
}

/// Whether a `KVM_RUN` failed for want of a thread.
fn is_run_short(value: &c_int) -> bool {
    let failed = *value == -1 && errno() == libc::EAGAIN;
    failed && (process::is_giving_up() || process::has_threads() && look(watch::is_short_of_threads))
}

fn errno() -> c_int {
    // SAFETY: the C library gives a valid pointer to the calling thread's errno.
    unsafe { *libc::__errno_location() }
}

/// Makes a call that may fail for want of a thread. Then the library gives up those that it has, and the call is made again
/// once they are gone.
pub(crate) fn yielding_threads<T>(call: impl Fn() -> T, is_short: impl Fn(&T) -> bool) -> T {
    /// A run ends soon after it was stopped. What takes longer is not worth the VMM's time.
    const LIMIT: Duration = Duration::from_secs(2);
    let value = call();
    if helper::is_own_thread() || watch::is_inside() || !is_short(&value) {
        return value;
    }
    match (process::has_threads(), process::is_giving_up()) {
        (true, _) => look(watch::give_threads_up),
        (false, true) => {}
        (false, false) => return value,
    }
    let until = Instant::now() + LIMIT;
    loop {
        // A thread that has ended counts for a moment longer. No standard lock is slept on here: this waits on a futex.
        std::thread::park_timeout(Duration::from_millis(1));
        let value = call();
        if !is_short(&value) || Instant::now() >= until {
            return value;
        }
    }
}

/// Does the library's work beside a call: errno stays as it was, and after a panic the library steps aside.
pub(crate) fn look<T: Default>(work: impl FnOnce() -> T) -> T {
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

    #[test]
    fn what_stands_in_for_other_functions_does_what_they_do() {
        let failed = |value: c_int, errno: c_int| {
            assert_eq!((value, std::io::Error::last_os_error().raw_os_error()), (-1, Some(errno)));
        };
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: no descriptor is as high as these, but the copy that is made, which nobody else has.
        unsafe {
            failed(close_range(2, 1, 0), libc::EINVAL);
            failed(dup2(-1, 900), libc::EBADF);
            failed(dup3(fd, fd, 0), libc::EINVAL);
            assert_eq!((dup2(fd, fd), dup2(fd, 900), dup3(fd, 901, libc::O_CLOEXEC)), (fd, 900, 901));
            assert_eq!((close_range(900, 901, 0), close_range(900, 901, 0)), (0, 0));
            failed(close(900), libc::EBADF);
        }
    }

    #[test]
    fn threads_and_processes_are_made() {
        unsafe extern "C" fn give_back(argument: *mut c_void) -> *mut c_void {
            argument
        }
        let mut thread = std::mem::MaybeUninit::uninit();
        let mut given = std::ptr::null_mut();
        let sent = std::ptr::without_provenance_mut(77);
        // SAFETY: the thread only returns its argument, and is joined once; the child only ends.
        unsafe {
            assert_eq!(pthread_create(thread.as_mut_ptr(), std::ptr::null(), give_back, sent), 0);
            assert_eq!(libc::pthread_join(thread.assume_init(), &raw mut given), 0);
            assert_eq!(given, sent);
            let child = fork();
            if child == 0 {
                libc::_exit(7);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert_eq!(libc::WEXITSTATUS(status), 7);
        }
    }

    #[test]
    fn a_call_that_fails_for_other_reasons_is_made_once() {
        let calls = std::cell::Cell::new(0);
        let call = || {
            calls.set(calls.get() + 1);
            libc::EAGAIN
        };
        // The library has no threads here that it could give up.
        assert_eq!((yielding_threads(call, |value| *value == libc::EAGAIN), calls.get()), (libc::EAGAIN, 1));
    }
}
