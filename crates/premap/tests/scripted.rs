//! The engine's answer to every errno, on a vCPU that says what the test tells it to.
//!
//! Only the second stage runs, so that no memory is needed behind the addresses.
// UNSAFETY: implements a trait with unsafe methods; none is called.
#![expect(unsafe_code, reason = "the trait's methods are unsafe to call")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use premap::{
    BACKGROUND_CHUNK, Backing, Budget, Engine, Fate, Gate, Gpa, GpaRange, Hva, Plan, Reason, Region, Report,
    Stages, Stop, Touch,
};
use premap_kvm::abi::{kvm_enable_cap, kvm_pre_fault_memory, kvm_userspace_memory_region};
use premap_kvm::{Errno, Stats, Vcpu, Vm};

const PAGE: u64 = 4096;

/// What the vCPU does with the page at a gpa.
#[derive(Clone, Copy)]
enum Page {
    Maps,
    Fails(Errno),
    /// Fails so many times, then maps.
    Later(Errno, u32),
    /// Spins until a signal comes, for ever.
    Spins,
    /// Advances by so many bytes, which may be none, part of a page, backward or beyond what was asked, and calls it done.
    Advances(u64),
    /// Maps, and leaves the root stale: what comes next spins until the root is renewed.
    Stales,
}

struct Scripted<F> {
    script: F,
    tries: u32,
    /// Whether the root is, so that nothing can be mapped.
    stale: bool,
}

impl<F: Fn(u64) -> Page + Send> Scripted<F> {
    fn page(&mut self, gpa: u64) -> Result<(), Errno> {
        let page = if self.stale { Page::Spins } else { (self.script)(gpa / PAGE) };
        let outcome = match page {
            Page::Stales => {
                self.stale = true;
                Ok(())
            }
            Page::Maps => Ok(()),
            Page::Fails(errno) => Err(errno),
            Page::Later(errno, times) if self.tries < times => {
                self.tries += 1;
                return Err(errno);
            }
            Page::Later(..) | Page::Advances(_) => Ok(()),
            Page::Spins => {
                // A sleep that a signal interrupts, as a spin in the kernel is; std's own would go on.
                let hour = rustix::thread::Timespec { tv_sec: 3600, tv_nsec: 0 };
                assert!(
                    !matches!(rustix::thread::nanosleep(&hour), rustix::thread::NanosleepRelativeResult::Ok),
                    "no signal came"
                );
                Err(Errno::INTR)
            }
        };
        self.tries = 0;
        outcome
    }
}

impl<F: Fn(u64) -> Page + Send> Vcpu for Scripted<F> {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        let begin = range.gpa;
        while range.size > 0 {
            if let Page::Advances(bytes) = (self.script)(range.gpa / PAGE) {
                range.gpa = if range.gpa == begin { begin.wrapping_add(bytes) } else { range.gpa };
                return Ok(());
            }
            match self.page(range.gpa) {
                Ok(()) => (range.gpa, range.size) = (range.gpa + PAGE, range.size - PAGE),
                Err(errno) => return if range.gpa == begin { Err(errno) } else { Ok(()) },
            }
        }
        Ok(())
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        self.stale = false;
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

fn plan(pages: u64) -> Plan {
    let range = GpaRange::new(Gpa::new(0), pages * PAGE);
    let region = Region { range, host: Hva::new(PAGE), backing: Backing::Anonymous, touch: Touch::Write };
    Plan::new([region]).and_then(|plan| plan.with_chunk(8 * PAGE)).expect("the region is aligned")
}

/// Runs the second stage over `pages` and gives its report, after checking that every byte is accounted for.
fn run(engine: Engine<'_>, pages: u64, vcpus: usize, script: impl Fn(u64) -> Page + Send + Copy) -> Report {
    go(engine, &plan(pages), vcpus, script)
}

/// The same over a plan.
fn go(engine: Engine<'_>, plan: &Plan, vcpus: usize, script: impl Fn(u64) -> Page + Send + Copy) -> Report {
    let mut vcpus: Vec<_> = (0..vcpus).map(|_| Scripted { script, tries: 0, stale: false }).collect();
    let report = engine.stages(Stages::Second).run(plan, &mut vcpus).expect("a vCPU was lent");
    assert_eq!((report.host.bytes(), report.second.bytes()), (plan.bytes(), plan.bytes()), "{report:?}");
    assert_eq!(report.host.skipped, plan.bytes());
    for fate in [Fate::Skipped, Fate::Failed, Fate::Abandoned] {
        let listed: u64 = lost(&report, |reason| reason.fate() == fate).map(|(_, pages)| pages * PAGE).sum();
        let summed = match fate {
            Fate::Skipped => report.second.skipped,
            Fate::Failed => report.second.failed,
            Fate::Abandoned => report.second.abandoned,
        };
        assert_eq!(listed, summed, "{fate:?} in {report:?}");
    }
    report
}

fn lost(report: &Report, which: impl Fn(Reason) -> bool) -> impl Iterator<Item = (u64, u64)> {
    let second = report.unmapped.iter().filter(|lost| lost.stage == premap::Stage::Second);
    second
        .filter(move |lost| which(lost.reason))
        .map(|lost| (lost.range.start().raw() / PAGE, lost.range.pages()))
        .collect::<Vec<_>>()
        .into_iter()
}

/// What is lost when pages 10 to 12 of 32 behave so: first page, number of pages, for the reason given.
#[track_caller]
fn check(middle: Page, expected: &[(u64, u64)], why: Reason) {
    for vcpus in [1, 2] {
        let engine = Engine::new().patience(Duration::from_millis(30));
        let report =
            run(engine, 32, vcpus, move |page| if (10..13).contains(&page) { middle } else { Page::Maps });
        assert_eq!(lost(&report, |reason| reason == why).collect::<Vec<_>>(), expected, "{report:?}");
        let all: u64 = expected.iter().map(|(_, pages)| pages * PAGE).sum();
        assert_eq!(report.second.mapped, report.asked - all, "{report:?}");
    }
}

#[test]
fn pages_that_cannot_be_mapped_cost_only_themselves() {
    check(Page::Maps, &[], Reason::NoMemslot);
    check(Page::Fails(Errno::NOENT), &[(10, 3)], Reason::NoMemslot);
    check(Page::Fails(Errno::FAULT), &[(10, 3)], Reason::Errno(Errno::FAULT));
    check(Page::Fails(Errno::HWPOISON), &[(10, 3)], Reason::Errno(Errno::HWPOISON));
}

#[test]
fn what_speaks_of_the_whole_range_costs_the_rest_of_the_chunk() {
    check(Page::Fails(Errno::INVAL), &[(10, 6)], Reason::Errno(Errno::INVAL));
    check(Page::Fails(Errno::NOMEM), &[(10, 6)], Reason::Errno(Errno::NOMEM));
}

#[test]
fn what_passes_is_tried_again() {
    check(Page::Later(Errno::INTR, 5), &[], Reason::NoProgress);
    check(Page::Later(Errno::AGAIN, 5), &[], Reason::Busy);
}

#[test]
fn progress_counts_in_whole_pages_of_what_was_asked_and_no_byte_is_lost() {
    // Less than a page, and backward, is no progress: the rest of the chunk stays with its reason.
    for bytes in [0, 1, PAGE - 1, PAGE.wrapping_neg(), 1_u64.wrapping_neg()] {
        check(Page::Advances(bytes), &[(10, 6)], Reason::Busy);
    }
    // A page and a half is a page.
    check(Page::Advances(PAGE + PAGE / 2), &[], Reason::Busy);
    // What lies beyond the call's range is not its own.
    check(Page::Advances(1 << 40), &[], Reason::Busy);
}

#[test]
fn a_hole_takes_few_calls_and_every_slot_that_is_as_long_as_a_step_is_mapped() {
    let gib = (1 << 30) / PAGE;
    // 16 GiB of nothing, but for 2 MiB in the midst and at the end, off every boundary.
    let there = move |page| (5 * gib + 77..5 * gib + 589).contains(&page) || page >= 16 * gib - 3;
    for (errno, why) in [(Errno::NOENT, Reason::NoMemslot), (Errno::FAULT, Reason::Errno(Errno::FAULT))] {
        let script = move |page| if there(page) { Page::Maps } else { Page::Fails(errno) };
        let plan = plan(16 * gib).with_chunk(BACKGROUND_CHUNK).unwrap();
        let report = go(Engine::new(), &plan, 2, script);
        assert!(report.second.calls < 40_000, "{report:?}");
        assert_eq!(report.second.mapped, 515 * PAGE, "{report:?}");
        let lost: Vec<_> = lost(&report, |reason| reason == why).collect();
        assert_eq!(lost, [(0, 5 * gib + 77), (5 * gib + 589, 11 * gib - 592)]);
    }
}

#[test]
fn more_host_threads_than_can_be_are_as_many_as_can_be() {
    let plan = plan(1);
    // Nothing can be made present at that address; that so many threads were asked for is no reason to fail.
    let mut lent = [Scripted { script: |_| Page::Maps, tries: 0, stale: false }];
    let report = Engine::new().stages(Stages::Host).host_threads(usize::MAX).run(&plan, &mut lent[..0]);
    assert_eq!(report.expect("it begins").host.bytes(), PAGE);
}

#[test]
fn what_never_passes_is_given_up_in_time() {
    check(Page::Fails(Errno::AGAIN), &[(10, 6)], Reason::Busy);
    check(Page::Fails(Errno::INTR), &[(10, 6)], Reason::NoProgress);
    check(Page::Spins, &[(10, 6)], Reason::NoProgress);
}

#[test]
fn a_gate_that_opens_and_closes_does_not_renew_patience() {
    let (gate, ended) = (Gate::new(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                drop(gate.close());
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        for errno in [Errno::AGAIN, Errno::INTR] {
            let engine = Engine::new().gate(&gate).patience(Duration::from_millis(20));
            let report = run(engine, 8, 1, move |_| Page::Fails(errno));
            assert_eq!(report.second.abandoned, report.asked, "{report:?}");
            // Retries are paced: without, it would be hundreds of thousands.
            assert!(report.second.calls < 2000, "{report:?}");
        }
        ended.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_stale_root_is_renewed_and_nothing_is_lost() {
    let script = |page| if matches!(page, 4 | 20) { Page::Stales } else { Page::Maps };
    let report = run(Engine::new().patience(Duration::from_millis(20)), 32, 1, script);
    assert_eq!(report.second.mapped, report.asked, "{report:?}");
}

#[test]
fn a_vcpu_that_always_spins_is_given_up_and_the_run_ends() {
    for vcpus in [1, 3] {
        let engine = Engine::new().patience(Duration::from_millis(20));
        let report = run(engine, 1024, vcpus, |_| Page::Spins);
        assert_eq!(report.second.abandoned, report.asked);
        assert!(report.second.calls < 20, "{report:?}");
    }
}

#[test]
fn unsupported_ends_the_second_stage_at_once() {
    for errno in [Errno::OPNOTSUPP, Errno::NOTTY] {
        let report = run(Engine::new(), 1024, 1, move |_| Page::Fails(errno));
        assert_eq!((report.second.skipped, report.second.calls), (report.asked, 1));
        assert!(report.second.unsupported.is_some());
    }
}

#[test]
fn a_dead_vm_ends_the_run() {
    let report =
        run(Engine::new(), 1024, 1, |page| if page < 20 { Page::Maps } else { Page::Fails(Errno::IO) });
    assert_eq!((report.second.mapped, report.second.abandoned), (20 * PAGE, 1004 * PAGE));
    assert_eq!(lost(&report, |reason| reason == Reason::VmDead).collect::<Vec<_>>(), [(20, 1004)]);
}

#[test]
fn stop_and_deadline_interrupt_a_call_under_way() {
    let spins_at = |page| if page < 20 { Page::Maps } else { Page::Spins };
    let stop = Stop::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            stop.stop();
        });
        let engine = Engine::new().stop(&stop).patience(Duration::from_secs(3600));
        let report = run(engine, 1024, 1, spins_at);
        assert_eq!(lost(&report, |reason| reason == Reason::Stopped).collect::<Vec<_>>(), [(20, 1004)]);
    });
    let budget = Budget { deadline: Some(Instant::now() + Duration::from_millis(30)), ..Budget::default() };
    let engine = Engine::new().budget(budget).patience(Duration::from_secs(3600));
    let report = run(engine, 1024, 1, spins_at);
    assert_eq!(lost(&report, |reason| reason == Reason::Deadline).collect::<Vec<_>>(), [(20, 1004)]);
    assert_eq!(report.abandoned(premap::Stage::Second).map(GpaRange::pages).sum::<u64>(), 1004);
}

#[test]
fn what_a_stop_leaves_undone_costs_neither_time_nor_memory_however_large_the_plan() {
    let region = |start: u64| Region {
        range: GpaRange::new(Gpa::new(start), 16 << 40),
        host: Hva::new(PAGE),
        backing: Backing::Anonymous,
        touch: Touch::Write,
    };
    // The first lies behind the second: the order is the plan's.
    let plan = Plan::new([region(32 << 40), region(0)]).and_then(|plan| plan.with_chunk(PAGE)).unwrap();
    let budget = |bytes| Budget { bytes: Some(bytes), ..Budget::default() };
    let stopped = Stop::new();
    stopped.stop();
    for (engine, done, why) in [
        (Engine::new().budget(budget(3 * PAGE)), 3 * PAGE, Reason::Budget),
        (Engine::new().stop(&stopped), 0, Reason::Stopped),
    ] {
        let script = |_| Page::Maps;
        let report = engine
            .stages(Stages::Second)
            .run(&plan, &mut [Scripted { script, tries: 0, stale: false }])
            .expect("a vCPU was lent");
        assert_eq!((report.second.mapped, report.second.bytes()), (done, 32 << 40), "{report:?}");
        let left: Vec<_> = report.unmapped.iter().filter(|lost| lost.reason == why).collect();
        let starts = left.iter().map(|lost| lost.range.start().raw()).collect::<Vec<_>>();
        assert_eq!(starts, [(32 << 40) + done, 0], "{report:?}");
        // Chunk by chunk, it would be eight thousand million.
        assert!(report.unmapped.len() <= 5, "{report:?}");
    }
}

/// A VM whose statistics take their time.
struct SlowVm;

impl Vm for SlowVm {
    fn check_extension(&self, _: u32) -> premap_kvm::Result<u32> {
        Ok(1)
    }

    fn enable_cap(&self, _: &kvm_enable_cap) -> premap_kvm::Result<()> {
        Err(Errno::INVAL)
    }

    unsafe fn set_user_memory_region(&self, _: &kvm_userspace_memory_region) -> premap_kvm::Result<()> {
        Err(Errno::INVAL)
    }

    unsafe fn get_dirty_log(&self, _: u32, _: &mut [u64]) -> premap_kvm::Result<()> {
        Err(Errno::NOENT)
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        std::thread::sleep(Duration::from_millis(20));
        Ok(Stats::default())
    }
}

#[test]
fn the_wall_clock_time_is_all_that_the_caller_waited_for() {
    let begin = Instant::now();
    let report = run(Engine::new().vm(&SlowVm), 32, 1, |_| Page::Maps);
    assert!(report.pages.is_some());
    let wall = Duration::from_nanos(report.wall_ns);
    assert!(wall >= Duration::from_millis(20) && wall <= begin.elapsed(), "{report:?}");
}

#[test]
fn a_byte_budget_is_kept_to_the_page() {
    for pages in [0, 1, 8, 13, 32, 40] {
        let budget = Budget { bytes: Some(pages * PAGE + 17), ..Budget::default() };
        let report = run(Engine::new().budget(budget), 32, 2, |_| Page::Maps);
        assert_eq!(report.second.mapped, pages.min(32) * PAGE);
        assert_eq!(report.second.abandoned, (32 - pages.min(32)) * PAGE);
    }
}

#[test]
fn progress_is_told_at_the_end_and_not_too_often() {
    let mut told = Vec::new();
    run(Engine::new().progress(|progress| told.push(*progress)), 32, 1, |_| Page::Maps);
    let last = told.last().expect("progress was told at least once");
    assert_eq!((last.asked, last.second), (32 * PAGE, 32 * PAGE));
    assert!(told.windows(2).all(|pair| pair[1].elapsed > pair[0].elapsed));
}

#[test]
fn the_second_stage_without_a_vcpu_is_refused() {
    let mut lent = [Scripted { script: |_| Page::Maps, tries: 0, stale: false }];
    assert!(matches!(Engine::new().run(&plan(1), &mut lent[..0]), Err(premap::Error::NoVcpu)));
}

#[test]
fn a_panicking_vcpu_does_not_hang_the_run() {
    let panicked =
        std::panic::catch_unwind(|| run(Engine::new(), 1024, 2, |_| panic!("the VMM's own fault")));
    assert!(panicked.is_err());
}

#[test]
fn a_panic_in_a_progress_callback_ends_the_run_as_if_stopped_and_then_goes_on() {
    for vcpus in [1, 3] {
        let engine =
            Engine::new().patience(Duration::from_secs(3600)).progress(|_| panic!("the VMM's own fault"));
        // Nothing but the watchdog ends these calls.
        let run = std::panic::AssertUnwindSafe(|| run(engine, 1024, vcpus, |_| Page::Spins));
        let panic = std::panic::catch_unwind(run).expect_err("the panic goes on");
        assert_eq!(panic.downcast_ref(), Some(&"the VMM's own fault"));
    }
}
