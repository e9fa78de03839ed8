//! Runs in the background, on a vCPU that tells what is done with it.
//!
//! Only the second stage runs, so that no memory is needed behind the addresses.

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use premap::{
    BACKGROUND_CHUNK, Background, Backing, Engine, Gate, Gpa, GpaRange, Hva, Pace, Plan, Reason, Region,
    Report, Stage, Stages, Stop, Touch,
};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};
use rustix::time::{ClockId, clock_gettime};

const CHUNKS: u64 = 64;
const BYTES: u64 = CHUNKS * BACKGROUND_CHUNK;
const LONG: Duration = Duration::from_secs(3600);

/// What a test sees of its vCPUs.
#[derive(Debug, Default)]
struct Seen {
    /// A call is under way.
    inside: AtomicBool,
    calls: AtomicU64,
    renewed: AtomicU64,
}

/// What a call does.
#[derive(Clone, Copy)]
enum Call {
    /// Takes so long, and maps all.
    Maps(Duration),
    /// Is at work on a processor for so long, and maps all.
    Works(Duration),
    /// Spins until a signal comes.
    Spins,
}

#[derive(Clone)]
struct Spare {
    seen: Arc<Seen>,
    /// What the call of this number does.
    script: fn(u64) -> Call,
}

impl Vcpu for Spare {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        self.seen.inside.store(true, Ordering::SeqCst);
        let result = match (self.script)(self.seen.calls.fetch_add(1, Ordering::SeqCst)) {
            Call::Maps(time) => {
                thread::sleep(time);
                (range.gpa, range.size) = (range.gpa + range.size, 0);
                Ok(())
            }
            Call::Works(time) => {
                let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("a time");
                let begin = now();
                while now() - begin < time {}
                (range.gpa, range.size) = (range.gpa + range.size, 0);
                Ok(())
            }
            // A sleep that a signal interrupts, as a spin in the kernel is; std's own would go on.
            Call::Spins => {
                let hour = rustix::thread::Timespec { tv_sec: 3600, tv_nsec: 0 };
                let slept = rustix::thread::nanosleep(&hour);
                assert!(!matches!(slept, rustix::thread::NanosleepRelativeResult::Ok), "no signal came");
                Err(Errno::INTR)
            }
        };
        self.seen.inside.store(false, Ordering::SeqCst);
        result
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        self.seen.renewed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

fn plan() -> Plan {
    let range = GpaRange::new(Gpa::new(0), BYTES);
    let region = Region { range, host: Hva::new(4096), backing: Backing::Anonymous, touch: Touch::Write };
    Plan::new([region]).expect("the region is aligned")
}

/// Begins a run on one spare vCPU whose calls are interrupted by nothing but what is tested.
fn begin(engine: Engine<'_>, script: fn(u64) -> Call) -> (Background<'static>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let spare = Spare { seen: Arc::clone(&seen), script };
    let engine = engine.stages(Stages::Second).patience(LONG);
    (engine.background(plan(), vec![spare]).expect("the run can begin"), seen)
}

/// The report of a run, after checking that every byte is accounted for.
fn end(background: Background<'_>) -> Report {
    let report = background.join().expect("threads can be had");
    assert_eq!(
        (report.asked, report.host.bytes(), report.second.bytes()),
        (BYTES, BYTES, BYTES),
        "{report:?}"
    );
    report
}

fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_micros(50));
    }
}

#[test]
fn all_is_mapped_in_small_chunks() {
    let (background, seen) = begin(Engine::new(), |_| Call::Maps(Duration::ZERO));
    wait_until(|| background.is_finished());
    let progress = background.progress();
    assert_eq!((progress.asked, progress.second), (BYTES, BYTES));
    let report = end(background);
    assert_eq!((report.second.mapped, report.second.calls), (BYTES, CHUNKS));
    assert_eq!(seen.renewed.load(Ordering::SeqCst), 1, "a spare vCPU begins with a new root");
}

#[test]
fn no_call_is_made_while_the_gate_is_closed_and_the_next_one_has_a_new_root() {
    let gate = Gate::new();
    let (background, seen) = begin(Engine::new().gate(&gate), |_| Call::Maps(Duration::from_micros(200)));
    for closings in 1..=10 {
        wait_until(|| seen.calls.load(Ordering::SeqCst) > 4 * closings);
        let guard = gate.close();
        let other = background.gate().close();
        let calls = seen.calls.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(2));
        assert!(!seen.inside.load(Ordering::SeqCst));
        drop(guard);
        thread::sleep(Duration::from_millis(2));
        assert_eq!(seen.calls.load(Ordering::SeqCst), calls, "the gate has another guard");
        drop(other);
        wait_until(|| seen.calls.load(Ordering::SeqCst) > calls);
        assert_eq!(seen.renewed.load(Ordering::SeqCst), 1 + closings);
    }
    assert_eq!(end(background).second.mapped, BYTES);
}

#[test]
fn what_the_vmm_has_forgotten_is_skipped_to_the_byte() {
    let page = |number: u64| GpaRange::new(Gpa::new(number * 4096), 4096);
    let gate = Gate::new();
    let guard = gate.close();
    // The plan is newer than that.
    guard.forget(page(7));
    let (background, _) = begin(Engine::new().gate(&gate), |_| Call::Maps(Duration::ZERO));
    let chunk = GpaRange::new(Gpa::new(3 * BACKGROUND_CHUNK - 8192), BACKGROUND_CHUNK);
    [page(1), page(2), chunk, page(2)].into_iter().for_each(|range| guard.forget(range));
    drop(guard);
    let report = end(background);
    let skipped: Vec<_> = report.unmapped.iter().filter(|lost| lost.stage == Stage::Second).collect();
    assert!(skipped.iter().all(|lost| lost.reason == Reason::Forgotten), "{report:?}");
    let ranges: Vec<_> = skipped.iter().map(|lost| lost.range).collect();
    assert_eq!(ranges, [page(1).join(page(2)).unwrap(), chunk]);
    assert_eq!(report.second.mapped, BYTES - 8192 - BACKGROUND_CHUNK);
    // The next run's plan is newer.
    let (background, _) = begin(Engine::new().gate(&gate), |_| Call::Maps(Duration::ZERO));
    assert_eq!(end(background).second.mapped, BYTES);
}

#[test]
fn what_went_between_planning_and_running_is_left_out() {
    let gone = GpaRange::new(Gpa::new(BACKGROUND_CHUNK + 4096), 3 * BACKGROUND_CHUNK);
    let (gate, early) = (Gate::new(), plan());
    gate.close().forget(gone);
    let late = plan();
    for (plan, skipped) in [(&early, gone.bytes()), (&late, 0), (&early, gone.bytes())] {
        let spare = Spare { seen: Arc::default(), script: |_| Call::Maps(Duration::ZERO) };
        let engine = Engine::new().stages(Stages::Second).gate(&gate);
        let report = end(engine.background(plan.clone(), vec![spare]).expect("the run can begin"));
        assert_eq!((report.second.skipped, report.second.mapped), (skipped, BYTES - skipped), "{report:?}");
    }
}

#[test]
fn closing_the_gate_interrupts_a_call_that_spins_and_nothing_is_lost() {
    let (background, seen) =
        begin(Engine::new(), |call| if call % 8 == 3 { Call::Spins } else { Call::Maps(Duration::ZERO) });
    while !background.is_finished() {
        // Nothing but this ends a call that spins.
        drop(background.gate().close());
        thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(end(background).second.mapped, BYTES);
    assert!(seen.calls.load(Ordering::SeqCst) > CHUNKS);
}

#[test]
fn a_stop_ends_a_call_under_way() {
    let spins = |call| if call < 5 { Call::Maps(Duration::ZERO) } else { Call::Spins };
    let stop = Stop::new();
    for by_handle in [false, true] {
        let (background, seen) = begin(Engine::new().stop(&stop), spins);
        wait_until(|| seen.calls.load(Ordering::SeqCst) > 5);
        if by_handle {
            stop.stop()
        } else {
            background.stop()
        }
        let report = end(background);
        assert_eq!(report.second.mapped, 5 * BACKGROUND_CHUNK);
        let left: Vec<_> = report.unmapped.iter().filter(|lost| lost.stage == Stage::Second).collect();
        assert!(matches!(left[..], [lost] if lost.reason == Reason::Stopped), "{report:?}");
    }
}

#[test]
fn a_stop_ends_a_run_that_waits_at_the_gate_or_for_its_pace() {
    let gate = Gate::new();
    let guard = gate.close();
    let (background, seen) = begin(Engine::new().gate(&gate), |_| Call::Maps(Duration::ZERO));
    thread::sleep(Duration::from_millis(5));
    background.stop();
    assert_eq!(end(background).second.abandoned, BYTES);
    assert_eq!(seen.calls.load(Ordering::SeqCst), 0);
    drop(guard);

    let one_a_day = Pace::BytesPerSecond(NonZeroU64::new(BACKGROUND_CHUNK / 86_400).unwrap());
    let (background, seen) = begin(Engine::new().pace(one_a_day), |_| Call::Maps(Duration::ZERO));
    wait_until(|| seen.calls.load(Ordering::SeqCst) == 1);
    thread::sleep(Duration::from_millis(5));
    background.stop();
    assert_eq!(end(background).second.mapped, BACKGROUND_CHUNK);
}

#[test]
fn a_run_that_is_dropped_has_ended_when_the_drop_is_over() {
    let (background, seen) = begin(Engine::new(), |_| Call::Spins);
    wait_until(|| seen.inside.load(Ordering::SeqCst));
    drop(background);
    assert!(!seen.inside.load(Ordering::SeqCst));
    assert_eq!(Arc::strong_count(&seen), 1, "the vCPU is gone with the run");
}

#[test]
fn a_pace_is_never_exceeded() {
    let rate = 16 * BYTES;
    let pace = Pace::BytesPerSecond(NonZeroU64::new(rate).unwrap());
    let (background, _) = begin(Engine::new().pace(pace), |_| Call::Maps(Duration::ZERO));
    let report = end(background);
    // The first chunk waits for nothing.
    let least = (CHUNKS - 1) * BACKGROUND_CHUNK * 1000 / rate;
    assert!(report.wall_ns >= least * 1_000_000, "{report:?}");

    let pace = Pace::PercentOfCore(NonZeroU16::new(25).unwrap());
    let (background, seen) = begin(Engine::new().pace(pace), |_| Call::Works(Duration::from_micros(200)));
    let report = end(background);
    // The first chunk waits for nothing; a millionth is left to rounding.
    let worked = seen.calls.load(Ordering::SeqCst) - 1;
    assert!(report.wall_ns >= 4 * 199_999 * worked, "{report:?}");
}

#[test]
fn vcpus_can_be_borrowed_for_a_scope() {
    let seen = Arc::new(Seen::default());
    let mut spares = vec![Spare { seen, script: |_| Call::Maps(Duration::from_micros(50)) }; 2];
    let report = thread::scope(|scope| {
        let engine = Engine::new().stages(Stages::Second);
        let background = engine.background_scoped(scope, plan(), spares.iter_mut().collect()).unwrap();
        end(background)
    });
    assert_eq!(report.second.mapped, BYTES);
}

#[test]
fn the_second_stage_without_a_spare_vcpu_is_refused() {
    assert!(matches!(Engine::new().background(plan(), Vec::<Spare>::new()), Err(premap::Error::NoVcpu)));
}

#[test]
fn a_panicking_vcpu_is_told_by_join() {
    let (background, _) = begin(Engine::new(), |_| panic!("the VMM's own fault"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| background.join())).is_err());
}
