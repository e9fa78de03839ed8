//! A record of the system calls that a piece of work makes, thread by thread.
//!
//! The work is done on a thread under a filter that allows nothing by itself: the kernel tells the observer of each call
//! (`SECCOMP_RET_USER_NOTIF`), who writes it down and lets it go on. Threads that the work starts inherit the filter. The
//! observer is not under it, and neither allocates nor takes a lock while the work goes on, since the call that it is told
//! of may be made with one held.
// UNSAFETY: a filter with a listener, its ioctls, and a thread's name read where the thread has it.
#![expect(unsafe_code, reason = "seccomp's notifications")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;

/// How many calls are written down at most.
const ROOM: usize = 1 << 18;

/// A system call that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The thread that made it.
    pub thread: u32,
    /// The call's number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// The name that the thread gives itself by it.
    pub name: Option<[u8; 16]>,
}

/// What was seen of a piece of work.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The thread on which it began.
    pub first: u32,
    /// The calls, in order.
    pub calls: Vec<Call>,
}

/// Does `work` on a thread of its own, and gives the calls that it makes, and those of the threads that it starts to the end
/// of the last of them. What is `refused`, by number, is answered with EAGAIN.
///
/// # Errors
/// The kernel's: it may have no notifications that signals leave alone, which came with Linux 5.19.
///
/// # Panics
/// If `work` does.
pub fn observe<R: Send>(work: impl FnOnce() -> R + Send, refused: &[i64]) -> io::Result<(R, Observed)> {
    let mut calls = Vec::with_capacity(ROOM);
    let (told, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let result = work();
        // What this thread made was told of by now; what it makes from here on is no work.
        done.store(told.load(Ordering::Acquire), Ordering::Release);
        result
    };
    let result = observe_each(work, refused, |call| {
        if calls.len() < ROOM {
            calls.push(call);
            told.store(calls.len(), Ordering::Release);
        }
    })?;
    let first = calls.first().map_or(0, |call| call.thread);
    let (done, mut index) = (done.into_inner(), 0);
    calls.retain(|call| {
        index += 1;
        index <= done || call.thread != first
    });
    Ok((result, Observed { first, calls }))
}

/// The same with each call given to `note`, which must neither allocate nor take a lock. So it is for work that ends the
/// process.
///
/// # Errors
/// As [`observe`].
///
/// # Panics
/// If `work` does.
pub fn observe_each<R: Send>(
    work: impl FnOnce() -> R + Send,
    refused: &[i64],
    note: impl FnMut(Call),
) -> io::Result<R> {
    const NONE: i32 = -1;
    let listener = AtomicI32::new(NONE);
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // From here on each call waits for the observer, so the descriptor is handed over without one.
            listener.store(listen(), Ordering::Release);
            work()
        });
        let fd = loop {
            match listener.load(Ordering::Acquire) {
                NONE => std::thread::sleep(Duration::from_millis(1)),
                fd => break fd,
            }
        };
        if fd < 0 {
            return Err(io::Error::from_raw_os_error(-fd));
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        let listener = unsafe { OwnedFd::from_raw_fd(fd) };
        attend(listener.as_raw_fd(), refused, note)?;
        Ok(thread.join())
    })?;
    Ok(result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Lays the filter on the calling thread, and gives the listener's descriptor, or the errno as a negative number below it.
fn listen() -> RawFd {
    let mut filter = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_USER_NOTIF }];
    let program = libc::sock_fprog { len: 1, filter: filter.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the calls read one program of one instruction, which lives until after them.
    let fd = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => fd,
        _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO).max(2),
    }
}

/// Notes and lets go on what the listener tells, until no thread is under the filter any more.
fn attend(listener: RawFd, refused: &[i64], mut note: impl FnMut(Call)) -> io::Result<()> {
    loop {
        let mut poll = libc::pollfd { fd: listener, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is read and written.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        if poll.revents & libc::POLLHUP != 0 {
            return Ok(());
        }
        // SAFETY: all zeros is a valid notification, and the one that the kernel wants to be given.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the ioctl writes one notification.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification) } != 0 {
            match io::Error::last_os_error() {
                // The thread was killed meanwhile, or a signal came.
                error if [Some(libc::ENOENT), Some(libc::EINTR)].contains(&error.raw_os_error()) => continue,
                error => return Err(error),
            }
        }
        let libc::seccomp_notif { pid: thread, data, .. } = notification;
        let name = match (i64::from(data.nr), data.args) {
            (libc::SYS_prctl, [option, name, ..])
                if option == u64::from(libc::PR_SET_NAME.unsigned_abs()) =>
            {
                let name = std::ptr::with_exposed_provenance::<[u8; 16]>(usize::try_from(name).unwrap_or(0));
                // SAFETY: the thread, which is of this process, gives the kernel a string there, and waits for us. Names
                // are put into 16 bytes by the C library and by Rust's.
                Some(unsafe { name.read_unaligned() })
            }
            _ => None,
        };
        note(Call { thread, number: data.nr.into(), arguments: data.args, name });
        let go_on = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or_default();
        let is_refused = refused.contains(&data.nr.into());
        let (error, flags) = if is_refused { (-libc::EAGAIN, 0) } else { (0, go_on) };
        let mut answer = libc::seccomp_notif_resp { id: notification.id, val: 0, error, flags };
        // SAFETY: the ioctl reads one answer. Where the thread is gone by now, nobody waits for it.
        unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    }
}
