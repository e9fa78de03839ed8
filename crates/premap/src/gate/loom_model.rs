//! The protocol under every interleaving; `cargo xtask test --only loom`.
// UNSAFETY: a cell that loom checks.
#![expect(unsafe_code, reason = "loom's cells are unsafe to reach into")]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use premap_address::Gpa;

use super::*;

/// What KVM has of slots: read by calls, written by changes. Loom fails the model where the two meet.
struct Slots(UnsafeCell<u64>);

// SAFETY: loom checks each access to the cell.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl Slots {
    fn call(&self) -> u64 {
        // SAFETY: loom checks that nobody writes the cell meanwhile.
        self.0.with(|slots| unsafe { *slots })
    }

    fn change(&self) {
        // SAFETY: loom checks that nobody else is in the cell.
        self.0.with_mut(|slots| unsafe { *slots += 1 });
    }
}

/// What each change takes away.
fn range() -> GpaRange {
    GpaRange::new(Gpa::new(0), 4096)
}

/// So many workers make two calls each while so many VMM threads change the slots once, one after the other: KVM has a
/// lock of its own for that.
fn check(workers: usize, changers: usize) {
    loom::model(move || {
        let gate = Gate::new();
        let entrance = Arc::new(gate.entrance(Moment::of_new_plan()));
        let slots = loom::sync::Arc::new((Slots(UnsafeCell::new(0)), loom::sync::Mutex::new(())));
        let mut threads = Vec::new();
        for _ in 0..workers {
            let (entrance, slots) = (entrance.clone(), slots.clone());
            threads.push(thread::spawn(move || {
                for _ in 0..2 {
                    let pass = entrance.enter(None, || None).expect("the run goes on");
                    // Whoever sees a change knows that there was one, and of what it took away.
                    let changes = slots.0.call();
                    assert!(changes <= pass.changes());
                    assert_eq!(pass.standing(range()) == Standing::Gone(range().bytes()), changes > 0);
                }
            }));
        }
        for _ in 0..changers {
            let (gate, slots) = (gate.clone(), slots.clone());
            threads.push(thread::spawn(move || {
                let guard = gate.close();
                guard.forget(range());
                let _alone = slots.1.lock();
                slots.0.change();
            }));
        }
        for thread in threads {
            thread.join().expect("no thread of the model panics");
        }
        let pass = entrance.enter(None, || None).expect("the gate is open");
        assert_eq!((slots.0.call(), pass.changes()), (changers as u64, changers as u64));
    });
}

#[test]
fn calls_and_changes_never_meet_and_nobody_waits_for_ever() {
    check(2, 1);
}

#[test]
fn many_may_close_the_gate_at_once() {
    check(1, 2);
}

#[test]
fn a_run_that_ends_leaves_a_closed_gate() {
    loom::model(|| {
        let gate = Gate::new();
        let entrance = Arc::new(gate.entrance(Moment::of_new_plan()));
        let over = loom::sync::Arc::new(AtomicBool::new(false));
        let guard = gate.close();
        let worker = {
            let (entrance, over) = (entrance.clone(), over.clone());
            thread::spawn(move || {
                let ended = || over.load(Ordering::Relaxed).then_some(Reason::Stopped);
                entrance.enter(None, ended).map(drop)
            })
        };
        over.store(true, Ordering::Relaxed);
        entrance.wake();
        assert_eq!(worker.join().expect("the worker does not panic"), Err(Reason::Stopped));
        drop(guard);
    });
}

/// Who looks at memory before it goes inside, and finds the gate closed no more often than at the look, has seen it all: also
/// where the gate was closed at the look, and the memory changed after it.
#[test]
fn a_look_as_new_as_the_gate_has_seen_every_change() {
    loom::model(|| {
        let gate = Gate::new();
        let entrance = gate.entrance(Moment::of_new_plan());
        let memory = loom::sync::Arc::new(loom::sync::atomic::AtomicUsize::new(0));
        let changer = {
            let (gate, memory) = (gate.clone(), memory.clone());
            thread::spawn(move || {
                let _guard = gate.close();
                memory.store(1, loom::sync::atomic::Ordering::Relaxed);
            })
        };
        let look = || memory.load(loom::sync::atomic::Ordering::Relaxed);
        let (over, looked) = (entrance.changes_over(), look());
        let pass = entrance.enter(None, || None).expect("the run goes on");
        if pass.changes() == over {
            assert_eq!(look(), looked);
        }
        drop(pass);
        changer.join().expect("no thread of the model panics");
    });
}
