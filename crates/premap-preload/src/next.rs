//! The functions that the library stands before: what a call would have reached without it.
//!
//! They are looked up at their first use, so that other preloaded libraries keep their place. While that goes on, and
//! where it fails, the system call is made directly: that is all that the C library's functions do. So a lookup that
//! itself calls `ioctl` or `close` ends, and nothing waits. No lookup makes threads or processes, and no system call does
//! what the C library does around them.
// UNSAFETY: dlsym, calls of what it found, and system calls with the caller's own arguments.
#![expect(unsafe_code, reason = "calls through to the C library")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
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
static CLOSE_RANGE: Next = Next::new(c"close_range");
static DUP2: Next = Next::new(c"dup2");
static DUP3: Next = Next::new(c"dup3");
static PTHREAD_CREATE: Next = Next::new(c"pthread_create");
static FORK: Next = Next::new(c"fork");
static EXECVE: Next = Next::new(c"execve");
static EXECVPE: Next = Next::new(c"execvpe");
static POSIX_SPAWN: Next = Next::new(c"posix_spawn");
static POSIX_SPAWNP: Next = Next::new(c"posix_spawnp");

/// A list of strings that ends with a null.
pub(crate) type Strings = *const *const c_char;

/// What a thread begins with.
pub(crate) type Start = unsafe extern "C" fn(*mut c_void) -> *mut c_void;

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, found: AtomicPtr::new(ptr::null_mut()), looking: AtomicBool::new(false) }
    }

    /// The function, unless it is being looked up: a lookup may itself call what is looked up.
    fn get(&self) -> Option<*mut c_void> {
        let found = self.found.load(Ordering::Acquire);
        if !found.is_null() {
            return Some(found);
        }
        if self.looking.swap(true, Ordering::AcqRel) {
            return None;
        }
        let found = self.look_up();
        self.looking.store(false, Ordering::Release);
        found
    }

    /// The function, for those that no lookup calls and no system call stands in for.
    fn get_now(&self) -> Option<*mut c_void> {
        let found = self.found.load(Ordering::Acquire);
        if found.is_null() { self.look_up() } else { Some(found) }
    }

    fn look_up(&self) -> Option<*mut c_void> {
        // SAFETY: the name is a C string, and RTLD_NEXT is a valid handle.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.found.store(found, Ordering::Release);
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

/// Calls the next `close_range`.
///
/// # Safety
/// The descriptors are the caller's to close.
pub(crate) unsafe fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int;
    match CLOSE_RANGE.get() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the descriptors are the caller's.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(first, last, flags) }
        }
        None => {
            // SAFETY: the descriptors are the caller's.
            let value = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
            c_int::try_from(value).unwrap_or(-1)
        }
    }
}

/// Calls the next `dup2`.
///
/// # Safety
/// The descriptor `new` is the caller's to close.
pub(crate) unsafe fn dup2(old: c_int, new: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int, c_int) -> c_int;
    match DUP2.get() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the descriptor is the caller's.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(old, new) }
        }
        // Not every machine has this call; where the two are equal, the other one refuses what this one allows.
        // SAFETY: the query changes nothing.
        None if old == new => match unsafe { libc::fcntl(old, libc::F_GETFD) } {
            -1 => -1,
            _ => new,
        },
        // SAFETY: the descriptor is the caller's.
        None => unsafe { dup3(old, new, 0) },
    }
}

/// Calls the next `dup3`.
///
/// # Safety
/// The descriptor `new` is the caller's to close.
pub(crate) unsafe fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;
    match DUP3.get() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the descriptor is the caller's.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(old, new, flags) }
        }
        None => {
            // SAFETY: the descriptor is the caller's.
            let value = unsafe { libc::syscall(libc::SYS_dup3, old, new, flags) };
            c_int::try_from(value).unwrap_or(-1)
        }
    }
}

/// Calls the next `pthread_create`.
///
/// # Safety
/// The arguments are ones that `pthread_create` may be called with.
pub(crate) unsafe fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    type Function =
        unsafe extern "C" fn(*mut libc::pthread_t, *const libc::pthread_attr_t, Start, *mut c_void) -> c_int;
    match PTHREAD_CREATE.get_now() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the arguments are the caller's promise.
            unsafe {
                std::mem::transmute::<*mut c_void, Function>(found)(thread, attributes, start, argument)
            }
        }
        // A program without the C library's threads does not come here.
        None => libc::ENOSYS,
    }
}

/// Calls the next `fork`.
///
/// # Safety
/// As for the C library's.
pub(crate) unsafe fn fork() -> libc::pid_t {
    type Function = unsafe extern "C" fn() -> libc::pid_t;
    match FORK.get_now() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)() }
        }
        // Every C library has it.
        None => -1,
    }
}

/// Which of the functions makes a child for another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spawn {
    /// The one that is given a path.
    Path,
    /// The one that looks in `PATH`.
    InPath,
}

/// Calls the next `posix_spawn` or `posix_spawnp`.
///
/// # Safety
/// The arguments are ones that the function may be called with.
pub(crate) unsafe fn spawn(
    which: Spawn,
    child: *mut libc::pid_t,
    program: *const c_char,
    actions: *const libc::posix_spawn_file_actions_t,
    attributes: *const libc::posix_spawnattr_t,
    arguments: Strings,
    environment: Strings,
) -> c_int {
    type Function = unsafe extern "C" fn(
        *mut libc::pid_t,
        *const c_char,
        *const libc::posix_spawn_file_actions_t,
        *const libc::posix_spawnattr_t,
        Strings,
        Strings,
    ) -> c_int;
    let next = match which {
        Spawn::Path => &POSIX_SPAWN,
        Spawn::InPath => &POSIX_SPAWNP,
    };
    match next.get_now() {
        Some(found) => {
            // SAFETY: the symbol of this name is a function of this type; the arguments are the caller's promise.
            unsafe {
                let function = std::mem::transmute::<*mut c_void, Function>(found);
                function(child, program, actions, attributes, arguments, environment)
            }
        }
        // Every C library has both.
        None => libc::ENOSYS,
    }
}

/// Calls the next `execve`.
///
/// # Safety
/// As for the C library's.
pub(crate) unsafe fn execve(path: *const c_char, arguments: Strings, environment: Strings) -> c_int {
    // SAFETY: the symbol of this name is a function of this type; the arguments are the caller's promise.
    unsafe { exec(&EXECVE, path, arguments, environment) }
}

/// Calls the next `execvpe`, which looks in `PATH`.
///
/// # Safety
/// As for the C library's.
pub(crate) unsafe fn execvpe(file: *const c_char, arguments: Strings, environment: Strings) -> c_int {
    // SAFETY: as above.
    unsafe { exec(&EXECVPE, file, arguments, environment) }
}

/// # Safety
/// The function is of this type, and may be called with these arguments.
unsafe fn exec(next: &Next, program: *const c_char, arguments: Strings, environment: Strings) -> c_int {
    type Function = unsafe extern "C" fn(*const c_char, Strings, Strings) -> c_int;
    match next.get_now() {
        Some(found) => {
            // SAFETY: the caller's promise.
            unsafe { std::mem::transmute::<*mut c_void, Function>(found)(program, arguments, environment) }
        }
        // Every C library has both.
        None => -1,
    }
}
