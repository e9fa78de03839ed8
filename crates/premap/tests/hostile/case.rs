//! One case: a run or a launch, made up from its seed.

use std::num::{NonZeroU16, NonZeroU64};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use premap::td::{Launch, Piece};
use premap::{
    Backing, Budget, Engine, Error, Fate, Gate, Gpa, GpaRange, HostMemory, Hva, Pace, Plan, Region, Report,
    Stage, Stages, Stop, Touch,
};

use crate::kvm::{Hostile, HostileVm, Kvm, PAGE, PANIC};
use crate::memory::Memory;
use crate::random::Random;

/// Does what the seed says, and checks what comes of it.
pub(crate) fn check(seed: u64, memory: &Memory) {
    let mut random = Random::new(seed);
    let stop = Stop::new();
    let kvm = Kvm::new(&mut random, &stop);
    if random.often(200) {
        return launch(&mut random, &kvm, &stop);
    }
    let plan = plan(&mut random, memory);
    // Before a host stage the address space is looked at, which takes longer than all the rest.
    let stages = random.pick(&[
        Stages::Both,
        Stages::Host,
        Stages::Second,
        Stages::Second,
        Stages::Second,
        Stages::Second,
        Stages::Second,
        Stages::Second,
    ]);
    let vcpus = random.pick(&[u64::from(stages != Stages::Host), 1, 1, 1, 2, 2, 3, 4]);
    let mut vcpus: Vec<_> = (0..vcpus).map(|_| Hostile::new(&kvm, &mut random)).collect();
    let gate = Gate::new();
    let begin = Instant::now();
    let mut engine = Engine::new().stages(stages).gate(&gate).patience(patience(&mut random));
    if random.often(500) {
        engine = engine.stop(&stop);
        if random.often(50) {
            stop.stop();
        }
    }
    if random.often(300) {
        engine = engine.host_threads(usize::try_from(random.below(3)).expect("few"));
    }
    engine = engine.pace(pace(&mut random, plan.bytes())).budget(budget(&mut random, plan.bytes()));
    let panics = random.often(10);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        if random.often(300) {
            in_background(engine, &mut random, &plan, vcpus, &gate)
        } else {
            let vm = HostileVm(Mutex::new(Hostile::new(&kvm, &mut random)));
            let mut engine = if random.often(300) { engine.vm(&vm) } else { engine };
            if panics {
                engine = engine.progress(|_| std::panic::panic_any(PANIC));
            }
            if random.often(200) {
                beside(&mut random, &gate, &stop, &plan, || Some(engine.run(&plan, &mut vcpus)))
            } else {
                Some(engine.run(&plan, &mut vcpus))
            }
        }
    }));
    if let Some(report) = unless_expected(outcome).flatten() {
        let report = report.expect("threads and signals can be had");
        assert_eq!(report.asked, plan.bytes());
        assert!(Duration::from_nanos(report.wall_ns) <= begin.elapsed(), "{report:?}");
        let claimed = kvm.claimed();
        assert!(report.second.mapped <= claimed, "{claimed} bytes were mapped: {report:?}");
        adds_up(&report, plan.regions());
    }
}

/// What was given, unless it was a panic that is part of the test.
fn unless_expected<T>(outcome: std::thread::Result<T>) -> Option<T> {
    match outcome {
        Ok(value) => Some(value),
        Err(panic) if panic.downcast_ref() == Some(&PANIC) => None,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Each stage accounts for every byte of the plan once, and lists what it did not map in the plan's order.
fn adds_up(report: &Report, regions: &[Region]) {
    for (stage, told) in [(Stage::Host, &report.host), (Stage::Second, &report.second)] {
        assert_eq!(told.bytes(), report.asked, "{stage:?} of {report:?}");
        let lost = || report.unmapped.iter().filter(|lost| lost.stage == stage);
        for (fate, bytes) in
            [(Fate::Skipped, told.skipped), (Fate::Failed, told.failed), (Fate::Abandoned, told.abandoned)]
        {
            let listed: u64 =
                lost().filter(|lost| lost.reason.fate() == fate).map(|lost| lost.range.bytes()).sum();
            assert_eq!(listed, bytes, "{fate:?} at {stage:?} of {report:?}");
        }
        // The regions of a plan lie apart here, so an entry lies in one of them.
        let places: Vec<_> = lost()
            .map(|lost| {
                let place = regions
                    .iter()
                    .position(|region| region.range.intersection(lost.range) == Some(lost.range));
                (place.unwrap_or_else(|| panic!("{lost:?} is not in the plan")), lost.range)
            })
            .collect();
        for pair in places.windows(2) {
            assert!(pair[0].0 < pair[1].0 || pair[0].1.end() <= pair[1].1.start(), "{stage:?} of {report:?}");
        }
    }
    let stages: Vec<_> = report.unmapped.iter().map(|lost| lost.stage).collect();
    assert!(stages.is_sorted(), "{report:?}");
}

fn patience(random: &mut Random) -> Duration {
    Duration::from_micros(random.from(500, 3000))
}

/// Up to four regions that lie apart, in any order, on memory of any kind.
fn plan(random: &mut Random, memory: &Memory) -> Plan {
    let slots: Vec<u64> = (0..random.below(5)).collect();
    let mut regions: Vec<_> = slots
        .into_iter()
        .map(|slot| {
            let pages = random.from(1, Memory::PAGES);
            let gpa = (slot << 32) + random.below(1000) * PAGE;
            let kinds = [memory.there(), memory.there(), memory.there(), memory.protected(), Hva::new(PAGE)];
            let backing = random.pick(&[Backing::Anonymous, Backing::Anonymous, Backing::GuestMemfd]);
            let touch = random.pick(&[Touch::Write, Touch::Read]);
            Region {
                range: GpaRange::new(Gpa::new(gpa), pages * PAGE),
                host: random.pick(&kinds),
                backing,
                touch,
            }
        })
        .collect();
    if random.often(500) {
        regions.reverse();
    }
    // Few chunks, since patience is had with each.
    let chunk = random.from(8, 64) * PAGE;
    Plan::new(regions).and_then(|plan| plan.with_chunk(chunk)).expect("the regions are aligned")
}

fn pace(random: &mut Random, bytes: u64) -> Pace {
    if random.often(850) {
        return Pace::Full;
    }
    // No more than some milliseconds in all.
    if random.often(500) {
        Pace::BytesPerSecond(NonZeroU64::new(bytes.max(PAGE) * 500).expect("not zero"))
    } else {
        Pace::PercentOfCore(NonZeroU16::new(50).expect("not zero"))
    }
}

fn budget(random: &mut Random, plan: u64) -> Budget {
    let bytes = random.often(200).then(|| random.below(plan + 2 * PAGE));
    let deadline = random.often(200).then(|| Instant::now() + Duration::from_micros(random.below(2000)));
    let limits = [HostMemory::Whole, HostMemory::Front, HostMemory::UpTo(random.below(plan + PAGE))];
    // A limit has files read too.
    let host_memory = if random.often(50) { random.pick(&limits) } else { HostMemory::Unlimited };
    Budget { bytes, deadline, host_memory }
}

/// What a VMM does meanwhile, on another thread.
fn meddle(random: &mut Random, gate: &Gate, stop: &Stop, plan: &Plan) {
    for _ in 0..random.below(6) {
        std::thread::sleep(Duration::from_micros(random.below(300)));
        let guard = gate.close();
        if random.often(500)
            && let Some(region) = plan.regions().first()
        {
            let page = random.below(region.range.pages());
            guard.forget(GpaRange::new(Gpa::new(region.range.start().raw() + page * PAGE), PAGE));
        }
        std::thread::sleep(Duration::from_micros(random.below(200)));
        drop(guard);
    }
    if random.often(100) {
        stop.stop();
    }
}

/// Runs while another thread meddles.
fn beside<T: Send>(random: &mut Random, gate: &Gate, stop: &Stop, plan: &Plan, run: impl FnOnce() -> T) -> T {
    let mut theirs = Random::new(random.next());
    std::thread::scope(|scope| {
        let meddler = scope.spawn(move || meddle(&mut theirs, gate, stop, plan));
        let outcome = catch_unwind(AssertUnwindSafe(run));
        meddler.join().expect("the VMM does not panic");
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn in_background(
    engine: Engine<'_>,
    random: &mut Random,
    plan: &Plan,
    vcpus: Vec<Hostile>,
    gate: &Gate,
) -> Option<Result<Report, Error>> {
    let background = match engine.background(plan.clone(), vcpus) {
        Ok(background) => background,
        Err(error) => return Some(Err(error)),
    };
    meddle(random, gate, &Stop::new(), plan);
    let progress = background.progress();
    assert!(progress.host <= progress.asked && progress.second <= progress.asked, "{progress:?}");
    if random.often(200) {
        background.stop();
    }
    if random.often(200) {
        drop(background);
        return None;
    }
    Some(background.join())
}

/// Launches a TD of some pieces.
fn launch(random: &mut Random, kvm: &Arc<Kvm>, stop: &Stop) {
    let pieces = (0..random.below(4))
        .map(|slot| Piece {
            range: GpaRange::new(Gpa::new(slot << 24), random.from(1, 40) * PAGE),
            content: vec![7; usize::try_from(random.below(PAGE)).expect("a page")].into(),
            measured: random.often(500),
        })
        .collect();
    let memory = GpaRange::new(Gpa::new(0), random.from(1, 64) * PAGE);
    let mut launch = Launch::new(pieces, 0).expect("the pieces lie apart").patience(patience(random));
    launch = launch.map_rest([memory]).stop(stop);
    if random.often(300) {
        launch = launch.without_reserving();
    }
    if random.often(10) {
        launch = launch.progress(|_| std::panic::panic_any(PANIC));
    }
    let vm = HostileVm(Mutex::new(Hostile::new(kvm, random)));
    let mut vcpus: Vec<_> = (0..random.from(1, 4)).map(|_| Hostile::new(kvm, random)).collect();
    let outcome = catch_unwind(AssertUnwindSafe(|| launch.run(&vm, &mut vcpus)));
    // An error says why, and the TD is of no use then.
    if let Some(Ok(report)) = unless_expected(outcome) {
        for part in [&report.reserve, &report.rest] {
            assert_eq!((part.host.bytes(), part.second.bytes()), (part.asked, part.asked), "{part:?}");
        }
    }
}
