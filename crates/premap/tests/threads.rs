//! Where the system has few threads to give, or none, the engine makes do; and it leaves none behind.
// UNSAFETY: limits and filters of the test's own threads and processes.
#![expect(unsafe_code, reason = "setrlimit, setuid, seccomp")]

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use premap::{
    Backing, Budget, Engine, Error, Gate, Gpa, GpaRange, Hva, Pace, Plan, Reason, Region, Report, Stages,
    Stop, Touch,
};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};
use rustix::thread::{NanosleepRelativeResult, Timespec, gettid, nanosleep};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
const LONG: Duration = Duration::from_secs(3600);

/// Maps on the threads that it notes, up to a page from which on it spins until a signal comes.
#[derive(Clone)]
struct Scripted {
    threads: Arc<Mutex<BTreeSet<i32>>>,
    spins_from: u64,
}

impl Scripted {
    fn new(spins_from: u64) -> Self {
        Self { threads: Arc::default(), spins_from }
    }

    /// The threads on which it was called.
    fn seen(&self) -> BTreeSet<i32> {
        self.threads.lock().expect("no panic").clone()
    }
}

impl Vcpu for Scripted {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        self.threads.lock().expect("no panic").insert(gettid().as_raw_nonzero().get());
        if range.gpa >= self.spins_from * PAGE {
            // A sleep that a signal interrupts, as a spin in the kernel is; std's own would go on.
            let slept = nanosleep(&Timespec { tv_sec: 3600, tv_nsec: 0 });
            assert!(!matches!(slept, NanosleepRelativeResult::Ok), "no signal came");
            return Err(Errno::INTR);
        }
        // Long enough for every thread to have its share.
        std::thread::sleep(Duration::from_millis(2));
        (range.gpa, range.size) = (range.gpa + range.size, 0);
        Ok(())
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

fn plan() -> Plan {
    let range = GpaRange::new(Gpa::new(0), PAGES * PAGE);
    let region = Region { range, host: Hva::new(PAGE), backing: Backing::Anonymous, touch: Touch::Write };
    Plan::new([region]).and_then(|plan| plan.with_chunk(2 * PAGE)).expect("the region is aligned")
}

fn run(engine: Engine<'_>, vcpu: &Scripted, vcpus: usize) -> Report {
    let report =
        engine.stages(Stages::Second).run(&plan(), &mut vec![vcpu.clone(); vcpus]).expect("it begins");
    assert_eq!((report.host.bytes(), report.second.bytes()), (PAGES * PAGE, PAGES * PAGE), "{report:?}");
    report
}

/// Lets the calling thread make none of these system calls any more: each gives this errno.
fn forbid(calls: &[libc::c_long], errno: i32) {
    let statement =
        |code: u32, k: u32| libc::sock_filter { code: u16::try_from(code).expect("a code"), jt: 0, jf: 0, k };
    let count = u8::try_from(calls.len()).expect("a few");
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (before, call) in (0..).zip(calls) {
        let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let jump = statement(code, u32::try_from(*call).expect("a number"));
        program.push(libc::sock_filter { jt: count - before, ..jump });
    }
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()));
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("a short program"),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the filter concerns the calling thread alone, and points to a program that lives until it was copied.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}

/// On a thread that can start no other.
fn without_threads(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            forbid(&[libc::SYS_clone, libc::SYS_clone3], libc::EAGAIN);
            test();
        });
    });
}

#[test]
fn with_no_thread_the_calling_one_maps_all_and_tells_progress() {
    without_threads(|| {
        let vcpu = Scripted::new(PAGES);
        let mut told = 0;
        let report = run(Engine::new().progress(|progress| told = progress.second), &vcpu, 3);
        assert_eq!((report.second.mapped, told), (PAGES * PAGE, PAGES * PAGE), "{report:?}");
        assert_eq!(vcpu.seen(), BTreeSet::from([gettid().as_raw_nonzero().get()]));

        let refused = Engine::new().background(plan(), vec![vcpu.clone()]);
        assert!(matches!(refused, Err(Error::Spawn(_))), "{refused:?}");
        let mut none: [Scripted; 0] = [];
        let report = Engine::new().stages(Stages::Host).run(&plan(), &mut none).expect("it needs no thread");
        assert_eq!(report.host.bytes(), PAGES * PAGE);
    });
}

#[test]
fn with_no_thread_calls_that_spin_are_interrupted_and_every_end_is_heard() {
    let (stop, gate) = (Stop::new(), Gate::new());
    let check = |engine: Engine<'_>, spins_from: u64, why: Reason| {
        let begin = Instant::now();
        let report = run(engine, &Scripted::new(spins_from), 1);
        assert!(report.unmapped.iter().any(|lost| lost.reason == why), "{report:?}");
        assert!(begin.elapsed() < LONG / 60, "{report:?}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            stop.stop();
        });
        without_threads(|| check(Engine::new().stop(&stop).patience(LONG), 20, Reason::Stopped));
    });
    let soon = || Budget { deadline: Some(Instant::now() + Duration::from_millis(30)), ..Budget::default() };
    let slow = Pace::BytesPerSecond(1.try_into().unwrap());
    let guard = gate.close();
    without_threads(|| {
        check(Engine::new().patience(Duration::from_millis(20)), 20, Reason::NoProgress);
        check(Engine::new().budget(soon()).patience(LONG), 20, Reason::Deadline);
        check(Engine::new().budget(soon()).patience(LONG).gate(&gate), PAGES, Reason::Deadline);
        check(Engine::new().budget(soon()).patience(LONG).pace(slow), PAGES, Reason::Deadline);
    });
    drop(guard);
}

#[test]
fn with_neither_thread_nor_timer_nothing_is_begun_that_could_not_be_ended() {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            forbid(&[libc::SYS_clone, libc::SYS_clone3, libc::SYS_timer_create], libc::EAGAIN);
            let vcpu = Scripted::new(PAGES);
            let refused = Engine::new().stages(Stages::Second).run(&plan(), &mut [vcpu.clone()]);
            assert!(matches!(refused, Err(Error::Spawn(_))), "{refused:?}");
            assert!(vcpu.seen().is_empty());
        });
    });
}

#[test]
fn a_limit_on_threads_costs_threads_and_nothing_else() {
    const CHILD: &str = "PREMAP_TEST_THREAD_LIMIT";
    if std::env::var_os(CHILD).is_some() {
        return limited();
    }
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "a_limit_on_threads_costs_threads_and_nothing_else"])
        .env(CHILD, "1")
        .output()
        .expect("it runs");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

/// How many threads this process has.
fn threads() -> u64 {
    std::fs::read_dir("/proc/self/task").expect("/proc is there").count() as u64
}

/// A thread that was joined may be listed, and counted, for a moment longer; one that outlives its run stays.
#[track_caller]
fn wait_for(expected: u64) {
    let begin = Instant::now();
    while threads() != expected {
        assert!(begin.elapsed() < Duration::from_secs(10), "a thread outlives its run");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn limited() {
    // root has no limit, and of other users nobody knows what else they run.
    // SAFETY: the process is the test's own, and does nothing afterwards that needs a privilege.
    let is_alone = unsafe {
        libc::geteuid() == 0 && libc::setuid(1_500_000_000 + std::process::id() % 500_000_000) == 0
    };
    let own = threads();
    for free in if is_alone { 0..6 } else { 0..1 } {
        let limit =
            libc::rlimit { rlim_cur: if is_alone { own + free } else { 1 }, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: `limit` outlives the call.
        let result = unsafe {
            let mut hard = limit;
            libc::getrlimit(libc::RLIMIT_NPROC, &raw mut hard);
            libc::setrlimit(libc::RLIMIT_NPROC, &libc::rlimit { rlim_max: hard.rlim_max, ..limit })
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        let expected = usize::try_from(free.clamp(1, 3)).expect("a few");
        let vcpu = Scripted::new(PAGES);
        let report = run(Engine::new().host_threads(2), &vcpu, 3);
        assert_eq!(report.second.mapped, report.asked, "{report:?}");
        assert_eq!(vcpu.seen().len(), expected, "{free} more threads could be had");
        wait_for(own);

        let vcpu = Scripted::new(PAGES);
        let engine = Engine::new().stages(Stages::Second);
        match engine.background(plan(), vec![vcpu.clone(); 3]) {
            Err(error) => assert!(free == 0 && matches!(error, Error::Spawn(_)), "{error}"),
            Ok(background) => {
                let report = background.join().expect("one thread will do");
                assert_eq!(report.second.mapped, report.asked, "{report:?}");
                let expected = usize::try_from(free.saturating_sub(1).clamp(1, 3)).expect("a few");
                assert_eq!(vcpu.seen().len(), expected, "{free} more threads could be had");
            }
        }
        wait_for(own);
    }
}
