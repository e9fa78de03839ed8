//! A storm of signals at threads of this process.
// UNSAFETY: a handler that does nothing, and signals to this process' own threads by number.
#![expect(unsafe_code, reason = "sends signals to threads")]

use std::ffi::c_int;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

extern "C" fn nothing(_: c_int) {}

/// Runs `work` while every thread of this process whose name starts with `name` gets a signal each millisecond. Gives
/// what `work` gave, and how many signals were sent.
pub fn during<T>(name: &str, work: impl FnOnce() -> T) -> (T, u64) {
    let signal = libc::SIGUSR2;
    // SAFETY: all zeros is a valid sigaction (no flags, so that calls are interrupted); the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(c_int) as libc::sighandler_t;
        assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                for thread in threads(name) {
                    // SAFETY: a signal to a thread of this process; one that has just ended gives ESRCH, and the handler
                    // above does nothing wherever it runs.
                    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
                    sent += u64::from(result == 0);
                }
                thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        let value = work();
        over.store(true, Ordering::Relaxed);
        (value, storm.join().expect("the storm does not panic"))
    })
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
