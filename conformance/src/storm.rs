//! Signals at threads of this process: a storm of them, or one that ends a call.
// UNSAFETY: a handler that does nothing, and signals to this process' own threads by number.
#![expect(unsafe_code, reason = "sends signals to threads")]

use std::ffi::c_int;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

const SIGNAL: c_int = libc::SIGUSR2;

extern "C" fn nothing(_: c_int) {}

/// Runs `work` while every thread of this process whose name starts with `name` gets a signal each millisecond. Gives
/// what `work` gave, and how many signals were sent.
pub fn during<T>(name: &str, work: impl FnOnce() -> T) -> (T, u64) {
    handle();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                sent += threads(name).into_iter().map(|thread| u64::from(send(thread))).sum::<u64>();
                thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        let value = work();
        over.store(true, Ordering::Relaxed);
        (value, storm.join().expect("the storm does not panic"))
    })
}

/// Runs `work`; if it takes longer than `patience`, this thread gets signals until it is done. Gives what `work` gave, and
/// whether it was interrupted.
pub fn interrupted_after<T>(patience: Duration, work: impl FnOnce() -> T) -> (T, bool) {
    handle();
    let this = rustix::thread::gettid().as_raw_nonzero().get();
    let (done, over) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let (mut wait, mut interrupted) = (patience, false);
            while over.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                send(this);
                (wait, interrupted) = (Duration::from_millis(5), true);
            }
            interrupted
        });
        let value = work();
        drop(done);
        (value, watchdog.join().expect("the watchdog does not panic"))
    })
}

/// Runs `work` while this thread gets signals, one upon the other.
pub fn pelted<T>(work: impl FnOnce() -> T) -> T {
    handle();
    let this = rustix::thread::gettid().as_raw_nonzero().get();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                send(this);
            }
        });
        let value = work();
        over.store(true, Ordering::Relaxed);
        value
    })
}

/// Gives the signal a handler that does nothing.
fn handle() {
    // SAFETY: all zeros is a valid sigaction (no flags, so that calls are interrupted); the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(c_int) as libc::sighandler_t;
        assert_eq!(libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()), 0);
    }
}

/// Sends the signal to a thread of this process, and gives whether there was one.
fn send(thread: c_int) -> bool {
    // SAFETY: a signal to a thread of this process; one that has just ended gives ESRCH, and the handler does nothing
    // wherever it runs.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) == 0 }
}

/// The threads of this process whose name starts so.
fn threads(name: &str) -> Vec<c_int> {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            let comm = fs::read_to_string(task.path().join("comm")).ok()?;
            comm.starts_with(name).then(|| task.file_name().to_str()?.parse().ok())?
        })
        .collect()
}
