//! A signal for the calling thread, from another.
// UNSAFETY: installs a handler that only counts, and sends a signal to a thread that is known to be alive.
#![expect(unsafe_code, reason = "signals")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test file uses a part of it")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Times that the handler ran.
pub(crate) static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Makes SIGUSR1 count.
pub(crate) fn install() {
    let handler = count as *const () as libc::sighandler_t;
    // SAFETY: the handler adds to an atomic, which is async-signal-safe.
    assert_ne!(unsafe { libc::signal(libc::SIGUSR1, handler) }, libc::SIG_ERR);
}

/// Runs `work` on this thread and sends it SIGUSR1 every `period` until it is done.
pub(crate) fn interrupted_after<R>(period: Duration, work: impl FnOnce() -> R) -> R {
    install();
    // SAFETY: pthread_self has no conditions.
    let target = unsafe { libc::pthread_self() };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = Instant::now();
            while !done.load(Ordering::SeqCst) {
                if last.elapsed() >= period {
                    // SAFETY: the thread waits for this scope's end, so it is alive.
                    unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
                    last = Instant::now();
                }
                thread::sleep(period.min(Duration::from_millis(1)) / 4);
            }
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        result
    })
}
