//! vCPUs at work: a thread each, up to the end of the machine.
//!
//! Whoever sees the end first says what it was. The others are then called out of `KVM_RUN` by a signal, again and again
//! until their threads are gone: one that came just before the call would be lost.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::siginfo_t;
use premap_guest::{Borrowable, errno, no_thread};
use premap_kvm::Errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::error::LinuxGuestError;
use crate::ports::Ports;

/// How often a thread that has not ended is called again.
const CALL: Duration = Duration::from_millis(1);

/// Up to where a guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Until {
    /// Text on the console that ends the run; without one the guest ends it, by powering off.
    pub marker: Option<String>,
    /// How long it may take.
    pub limit: Duration,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The marker was on the console.
    Marker,
    /// The guest powered off.
    PowerOff,
    /// The guest reset the machine, as a reboot does, and a panic.
    Reset,
    /// The time was over.
    TimeLimit,
}

/// The end, once it is known.
#[derive(Debug, Default)]
struct Finish {
    ended: Mutex<Option<Result<(End, Instant), LinuxGuestError>>>,
    known: Condvar,
    over: AtomicBool,
}

impl Finish {
    /// Says how it ended, unless somebody did before.
    fn end(&self, how: Result<End, LinuxGuestError>) {
        let now = Instant::now();
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.get_or_insert_with(|| how.map(|end| (end, now)));
        // Relaxed: the flag only ends loops; what ended them is read under the lock.
        self.over.store(true, Ordering::Relaxed);
        self.known.notify_all();
    }

    /// Waits for the end, and makes it the time limit's where none comes.
    fn wait(&self, limit: Duration) -> Result<(End, Instant), LinuxGuestError> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.known.wait_timeout_while(ended, limit, |ended| ended.is_none());
        drop(waited);
        self.end(Ok(End::TimeLimit));
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.clone().unwrap_or_else(|| Ok((End::TimeLimit, Instant::now())))
    }
}

type Vcpus = Vec<Borrowable<VcpuFd>>;

/// Runs the vCPUs up to the end, and gives it with the time that it took. `vcpus` are there again afterwards. Every thread is
/// there before one gets its vCPU: where the host gives too few, nothing has run.
pub(crate) fn run(
    vcpus: &mut Vcpus,
    ports: &Arc<Mutex<Ports>>,
    limit: Duration,
) -> Result<(End, Duration), LinuxGuestError> {
    let signal = SIGRTMIN();
    register_signal_handler(signal, ignore).map_err(|error| LinuxGuestError::Os {
        what: "sigaction",
        errno: Errno::from_raw_os_error(error.errno()),
    })?;
    let finish = Arc::new(Finish::default());
    let (mut threads, mut senders) = (Vec::new(), Vec::new());
    for index in 0..vcpus.len() {
        let (ports, finish) = (Arc::clone(ports), Arc::clone(&finish));
        let (sender, receiver) = channel();
        let body = move || receiver.recv().ok().map(|fd| work(fd, index, &ports, &finish));
        match Builder::new().name(format!("vcpu{index}")).spawn(body) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                // None has a vCPU yet; without a sender none will get one.
                drop(senders);
                for thread in threads.drain(..) {
                    thread.join().expect("a thread without a vCPU doesn't panic");
                }
                return Err(no_thread(index, vcpus.len(), &error).into());
            }
        }
        senders.push(sender);
    }
    let begun = Instant::now();
    for (sender, fd) in senders.iter().zip(std::mem::take(vcpus)) {
        sender.send(fd).expect("a thread waits for its vCPU");
    }
    let ended = finish.wait(limit);
    while threads.iter().any(|thread| !thread.is_finished()) {
        for thread in threads.iter().filter(|thread| !thread.is_finished()) {
            // A thread that is just gone needs no call.
            let _ = thread.kill(signal);
        }
        thread::sleep(CALL);
    }
    let back = threads.into_iter().map(|thread| thread.join().expect("a vCPU's thread doesn't panic"));
    vcpus.extend(back.flatten());
    ended.map(|(end, when)| (end, when.duration_since(begun)))
}

/// A vCPU's thread.
fn work(
    mut fd: Borrowable<VcpuFd>,
    index: usize,
    ports: &Mutex<Ports>,
    finish: &Finish,
) -> Borrowable<VcpuFd> {
    while !finish.over.load(Ordering::Relaxed) {
        match step(&mut fd.0, ports) {
            Ok(None) => {}
            Ok(Some(end)) => finish.end(Ok(end)),
            Err(reason) => finish.end(Err(LinuxGuestError::Vcpu { vcpu: index, reason })),
        }
    }
    fd
}

/// Runs the vCPU to its next exit and serves that.
fn step(fd: &mut VcpuFd, ports: &Mutex<Ports>) -> Result<Option<End>, String> {
    match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => Ok(lock(ports).write(port, data)),
        Ok(VcpuExit::IoIn(port, data)) => {
            lock(ports).read(port, data);
            Ok(None)
        }
        // No device is behind memory: an empty bus.
        Ok(VcpuExit::MmioRead(_, data)) => {
            data.fill(0xff);
            Ok(None)
        }
        Ok(VcpuExit::MmioWrite(..)) => Ok(None),
        // A triple fault, which is a way to reset a PC.
        Ok(VcpuExit::Shutdown) => Ok(Some(End::Reset)),
        Ok(VcpuExit::InternalError) => {
            Err("KVM_EXIT_INTERNAL_ERROR: this KVM can't do what the kernel asks of a processor".to_owned())
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            Err(format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on CPU {cpu}"))
        }
        Ok(exit) => Err(format!("{exit:?}")),
        // A vCPU that another started gives EAGAIN first.
        Err(error) => match errno(error) {
            Errno::INTR | Errno::AGAIN => Ok(None),
            errno => Err(format!("KVM_RUN failed: {errno}")),
        },
    }
}

pub(crate) fn lock(ports: &Mutex<Ports>) -> MutexGuard<'_, Ports> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Only interrupts a call.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let finish = Finish::default();
        finish.end(Ok(End::PowerOff));
        finish.end(Ok(End::Reset));
        assert_eq!(finish.wait(Duration::ZERO).unwrap().0, End::PowerOff);
    }

    #[test]
    fn without_an_end_it_is_the_time_limit_s() {
        let finish = Finish::default();
        assert_eq!(finish.wait(Duration::ZERO).unwrap().0, End::TimeLimit);
        assert!(finish.over.load(Ordering::Relaxed));
    }
}
