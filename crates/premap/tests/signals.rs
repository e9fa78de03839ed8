//! Which signal interrupts a call, beside a program that has handlers of its own. One test, since they are the process's.
// UNSAFETY: sigaction on the test's own process.
#![expect(unsafe_code, reason = "takes signals as a VMM would")]

use std::ffi::c_int;
use std::time::Duration;

use premap::{Backing, Engine, Error, Gpa, GpaRange, Hva, Plan, Reason, Region, Report, Stages, Touch};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};
use rustix::thread::{NanosleepRelativeResult, Timespec, nanosleep};

/// Spins until a signal comes.
struct Spins;

impl Vcpu for Spins {
    fn pre_fault_memory(&mut self, _: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        let slept = nanosleep(&Timespec { tv_sec: 3600, tv_nsec: 0 });
        assert!(!matches!(slept, NanosleepRelativeResult::Ok), "no signal came");
        Err(Errno::INTR)
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

/// The handler of another copy of the library, or of the VMM.
extern "C" fn theirs(_: c_int) {
    panic!("a signal of the program's own was sent");
}

fn their_handler() -> libc::sighandler_t {
    theirs as extern "C" fn(c_int) as libc::sighandler_t
}

fn set(signal: c_int, handler: libc::sighandler_t) {
    // SAFETY: all zeros is a valid sigaction, and the handler is never called, or the test fails.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
    }
}

fn handler(signal: c_int) -> libc::sighandler_t {
    // SAFETY: a null new action only asks.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        assert_eq!(libc::sigaction(signal, std::ptr::null(), &raw mut action), 0);
        action.sa_sigaction
    }
}

fn run(engine: Engine<'_>) -> Result<Report, Error> {
    let range = GpaRange::new(Gpa::new(0), 4096);
    let region = Region { range, host: Hva::new(4096), backing: Backing::Anonymous, touch: Touch::Write };
    let plan = Plan::new([region]).expect("the region is aligned");
    engine.stages(Stages::Second).patience(Duration::from_millis(10)).run(&plan, &mut [Spins])
}

#[test]
fn the_next_free_signal_is_taken_and_none_of_the_program_s_is_touched() {
    let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX() - 1);
    (first..=last).for_each(|signal| set(signal, their_handler()));
    assert!(matches!(run(Engine::new()), Err(Error::NoFreeSignal)));
    assert!(matches!(run(Engine::new().signal(last)), Err(Error::SignalTaken(signal)) if signal == last));

    // An ignored signal never becomes pending: it is taken too.
    set(last - 1, libc::SIG_IGN);
    set(last - 2, libc::SIG_DFL);
    set(last - 5, libc::SIG_DFL);
    for _ in 0..2 {
        let report = run(Engine::new()).expect("a signal is free");
        assert!(report.unmapped.iter().any(|lost| lost.reason == Reason::NoProgress), "{report:?}");
    }
    let others = (first..=last).filter(|signal| ![last - 1, last - 2, last - 5].contains(signal));
    assert!(others.into_iter().all(|signal| handler(signal) == their_handler()));
    assert_eq!((handler(last - 1), handler(last - 5)), (libc::SIG_IGN, libc::SIG_DFL));
    run(Engine::new().signal(last - 5)).expect("the caller's choice is free");
}
