//! Signals: a pre-fault ends with EINTR, or with the progress that it made, and no storm keeps it from going on.

mod guest;
#[path = "guest/signal.rs"]
mod signal;

use std::sync::atomic::Ordering;
use std::time::Duration;

use guest::*;
use premap_address::PAGE_SIZE;
use premap_kvm::Errno;
use premap_softkvm::Profile;

const GPA: u64 = 1 << 32;
const PAGES: u64 = 64 << 8;

/// Both in one test, since they share the process's handler and count.
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
