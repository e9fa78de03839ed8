//! Signals: a pre-fault ends with EINTR, or with the progress that it made, and no storm keeps it from going on.

mod guest;
#[path = "guest/signal.rs"]
mod signal;
#[path = "guest/userfaultfd.rs"]
mod userfaultfd;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use guest::*;
use premap_address::PAGE_SIZE;
use premap_kvm::Errno;
use premap_softkvm::Profile;

const GPA: u64 = 1 << 32;
const PAGES: u64 = 64 << 8;

#[test]
fn a_storm_costs_calls_and_loses_nothing() {
    let memory = Memory::anonymous(PAGES);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let (mut calls, mut interrupted) = (0, 0);
    signal::interrupted_after(Duration::from_micros(500), || {
        let (mut gpa, mut left) = (GPA, PAGES);
        while left > 0 {
            let (result, next, rest) = pre_fault(&mut vcpu, gpa, left);
            match result {
                Ok(()) => assert!(rest < left, "success means progress"),
                Err(Errno::INTR) => {
                    assert_eq!((next, rest), (gpa, left), "an error leaves the range");
                    interrupted += 1;
                }
                Err(errno) => panic!("{errno}"),
            }
            (gpa, left) = (next, rest);
            calls += 1;
        }
        assert_eq!(gpa, GPA + PAGES * PAGE_SIZE);
    });
    let handled = signal::HANDLED.load(Ordering::SeqCst);
    println!("{calls} calls, {interrupted} interrupted before any progress, {handled} signals");
    assert!(calls > 1 && handled > 0, "no signal arrived: {calls} calls, {handled} signals");
    assert_eq!(mapped(&vm), [PAGES, 0, 0]);
}

#[test]
fn a_page_that_does_not_come_is_waited_for_until_a_signal() {
    let memory = Memory::anonymous(8);
    let vm = vm(Profile::V6_12);
    attach(&vm, 0, 0, GPA, &memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let Some(handler) = userfaultfd::Handler::register(&memory) else { return };
    let started = Instant::now();
    let wait = Duration::from_millis(50);
    let answer = signal::interrupted_after(wait, || pre_fault(&mut vcpu, GPA, 8));
    assert_eq!(answer, (Err(Errno::INTR), GPA, 8));
    assert!(started.elapsed() >= wait / 2, "it did not wait");
    handler.resolve(&memory);
    pre_fault_all(&mut vcpu, GPA, 8);
    assert_eq!(mapped(&vm), [8, 0, 0]);
}
