//! What a VMM does in each mode.

use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use premap::seccomp::Mode;
use premap::working_set::Recorder;
use premap::{Budget, Engine, Gate, HostMemory, Pace, Plan, Region, Report, Touch};
use premap_address::{Gpa, PAGE_SIZE};
use premap_guest::{Backing, Memory};

use crate::host::{self, BYTES, Host};
use crate::vcpu::Troubled;

/// How long a call may stall: longer than a gate takes to close.
const PATIENCE: Duration = Duration::from_millis(200);

/// Does what the mode is about under `confine`; all else, before and after.
pub(crate) fn run(mode: Mode, confine: impl FnOnce(&mut (dyn FnMut() + Send))) {
    if mode == Mode::Recorder {
        return record(confine);
    }
    host::with(|Host { vm, vcpu, spare, plan, .. }| {
        let stalls = AtomicBool::new(false);
        let mut troubled = Troubled::new(vcpu, &stalls);
        confine(&mut || {
            let (engine, plan) = (Engine::new().patience(PATIENCE), plan.clone());
            match mode {
                Mode::Vm => map(engine.vm(vm), &plan, &mut [&mut *spare]),
                Mode::HostMemory => {
                    // All fits, and then not all of it.
                    map(engine.budget(Budget::within_host_memory()), &plan, &mut [&mut *spare]);
                    let little = Budget { host_memory: HostMemory::UpTo(BYTES), ..Budget::default() };
                    Engine::new().budget(little).run(&plan, &mut [&mut *spare]).unwrap();
                }
                Mode::Pace => {
                    let pace = Pace::PercentOfCore(NonZeroU16::new(400).unwrap());
                    map(engine.pace(pace), &plan, &mut [&mut *spare]);
                }
                Mode::Gate => thread::scope(|scope| {
                    let gate = Gate::new();
                    let engine = engine.gate(&gate);
                    let background = engine.background_scoped(scope, plan, vec![&mut troubled]).unwrap();
                    while !stalls.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                    drop(gate.close());
                    check(&background.join().unwrap());
                }),
                Mode::Background => thread::scope(|scope| {
                    let background = engine.background_scoped(scope, plan, vec![&mut troubled]).unwrap();
                    check(&background.join().unwrap());
                }),
                _ => map(engine.host_threads(1), &plan, &mut [&mut troubled]),
            }
        });
    });
}

fn map<V: premap_kvm::Vcpu + Send>(mut engine: Engine<'_>, plan: &Plan, vcpus: &mut [V]) {
    check(&engine.run(plan, vcpus).unwrap());
}

/// What can be mapped is.
fn check(report: &Report) {
    assert!(report.host.mapped >= 2 * BYTES, "{report:?}");
}

fn record(confine: impl FnOnce(&mut (dyn FnMut() + Send))) {
    let memory = Memory::new(BYTES, Backing::Anonymous).unwrap();
    let region: Region = memory.region(Gpa::new(0), Touch::Write);
    confine(&mut || {
        let mut recorder = Recorder::new(&[region]).unwrap();
        // On a busy machine the guest may have come to its end before the first look beside it.
        let is_looked_at = (0..200).any(|_| {
            let before = recorder.looks();
            let guest = || {
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_millis(20) {
                    memory.write_word(PAGE_SIZE, 1);
                }
            };
            recorder.watch(Duration::from_millis(1), guest).unwrap();
            // The last look is the caller's own.
            recorder.looks() - before > 1
        });
        assert!(is_looked_at);
    });
}
