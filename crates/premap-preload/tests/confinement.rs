//! The library preloaded into a VMM that confines itself, as the table of `premap::seccomp` has it.
//!
//! The VMM is this very program, run again for its one ignored test. Its own calls are those that it makes without the library;
//! whatever comes with the library must be in the table.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

// UNSAFETY: the machine has memory that a guest writes.
#[path = "vmm/machine.rs"]
#[expect(unsafe_code, dead_code, reason = "shared with a test that does more with it")]
mod machine;

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::process::{Command, Output};

use confinement::{Call, Difference, Observed, allow, apply_filter, compare, observe_each};
use kvm_ioctls::Kvm;
use machine::Machine;
use premap::seccomp::{Argument, Mode, Need, Rule, Syscall, Thread, rules};
use premap_exec_settings::{LIBRARY, Report, Seccomp, Settings, VARIABLE};

/// What the VMM is told: to be observed; or which calls are its own, and so to confine itself.
const OWN: &str = "PREMAP_TEST_OWN_CALLS";
const OBSERVED: &str = "observed";
/// Or to change to this directory.
const CHROOT: &str = "chroot:";
/// What a rule is called that is not the library's.
const VMM: &str = "the VMM's own";
const MODES: [Mode; 2] = [Mode::ExecStart, Mode::Exec];

#[test]
#[ignore = "the VMM that the other tests run"]
fn vmm() {
    let own = std::env::var(OWN).unwrap();
    if let Some(directory) = own.strip_prefix(CHROOT) {
        let kvm = Kvm::new().unwrap();
        std::os::unix::fs::chroot(directory).unwrap();
        Machine::new(&kvm).run().unwrap();
        return;
    }
    if own == OBSERVED {
        let mut out = std::fs::File::options().write(true).open("/proc/self/fd/1").unwrap();
        let done = observe_each(work, &[], |call| tell(&call, &mut out));
        panic!("the work ends the process: {done:?}");
    }
    let mut all = rules(&MODES);
    all.extend(own.split_whitespace().map(parse_rule));
    apply_filter(&allow(&all, &[]).unwrap()).unwrap();
    work();
}

/// What any VMM does, and the process's end.
fn work() {
    let kvm = Kvm::new().unwrap();
    let mut machine = Machine::new(&kvm);
    std::thread::scope(|scope| {
        scope.spawn(|| machine.run().unwrap());
    });
    drop(machine);
    std::process::exit(0);
}

/// Writes a call as a line, without a heap.
fn tell(Call { thread, number, arguments, name }: &Call, out: &mut impl Write) {
    let mut line = [0; 512];
    let mut cursor = Cursor::new(&mut line[..]);
    let name =
        name.as_ref().map_or(&[] as &[u8], |name| name.split(|byte| *byte == 0).next().unwrap_or(name));
    write!(cursor, "\ncall {thread} {number}").unwrap();
    arguments.iter().for_each(|argument| write!(cursor, " {argument}").unwrap());
    writeln!(cursor, " {}", std::str::from_utf8(name).unwrap_or("")).unwrap();
    let length = usize::try_from(cursor.position()).unwrap();
    out.write_all(&line[..length]).unwrap();
}

fn parse_call(line: &str) -> Option<Call> {
    let mut words = line.strip_prefix("call ")?.split(' ');
    let mut number = || words.next()?.parse::<u64>().ok();
    let (thread, call) = (u32::try_from(number()?).ok()?, i64::try_from(number()?).ok()?);
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = number()?;
    }
    let mut name = [0; 16];
    let given = words.next().unwrap_or_default().as_bytes();
    name[..given.len()].copy_from_slice(given);
    Some(Call { thread, number: call, arguments, name: (!given.is_empty()).then_some(name) })
}

/// What the VMM calls without the library, as text, and how often.
fn own_calls() -> BTreeMap<String, usize> {
    let mut own = BTreeMap::new();
    observe(None).calls.iter().for_each(|call| *own.entry(own_rule(call)).or_default() += 1);
    own
}

/// A rule that allows a call of the VMM's own, as text: its number, and what its request or advice is.
fn own_rule(call: &Call) -> String {
    match call.number {
        libc::SYS_ioctl => format!("{}:1:{}", call.number, call.arguments[1] & u64::from(u32::MAX)),
        libc::SYS_madvise => format!("{}:2:{}", call.number, call.arguments[2]),
        number => number.to_string(),
    }
}

fn parse_rule(text: &str) -> Rule {
    let mut parts = text.split(':');
    let number = parts.next().unwrap().parse().unwrap();
    let argument = parts.next().map(|index| {
        let value = parts.next().unwrap().parse().unwrap();
        Argument { index: index.parse().unwrap(), value, name: VMM }
    });
    let syscall = Syscall { number, name: VMM };
    Rule { thread: Thread::Caller, syscall, argument, need: Need::Sometimes(VMM) }
}

fn run(own: &str, library: Option<PathBuf>, seccomp: Seccomp) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "vmm", "--nocapture"]).env(OWN, own);
    if let Some(library) = library {
        let report = Some(Report::Descriptor(2));
        let settings = Settings { seccomp, report, ..Settings::default() };
        command.env("LD_PRELOAD", library).env(VARIABLE, settings.encode().unwrap());
    }
    command.output().unwrap()
}

fn observe(library: Option<PathBuf>) -> Observed {
    let output = run(OBSERVED, library, Seccomp::Trust);
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let calls: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().filter_map(parse_call).collect();
    Observed { first: calls[0].thread, calls }
}

/// The library, built with this test; none where there is no KVM to watch.
fn library() -> Option<PathBuf> {
    if let Err(error) = Kvm::new() {
        assert!(std::env::var_os("PREMAP_REQUIRE_KVM").is_none(), "/dev/kvm: {error}");
        eprintln!("skipped: /dev/kvm: {error}");
        return None;
    }
    let own = std::env::current_exe().unwrap();
    let places = own.ancestors().skip(1).take(2).map(|place| place.join(LIBRARY));
    Some(places.into_iter().find(|place| place.is_file()).expect("cargo builds the library with its tests"))
}

#[test]
fn every_call_of_the_library_has_a_rule_and_every_rule_a_call() {
    let Some(library) = library() else { return };
    let mut own = own_calls();
    let mut seen = observe(Some(library));
    let names = seen.calls.iter().filter(|call| call.name.is_some_and(|name| name.starts_with(b"premap")));
    let library: Vec<_> = names.map(|call| call.thread).collect();
    let is_library = |call: &Call| library.contains(&call.thread);
    // On the VMM's threads, what is more than without.
    seen.calls.retain(|call| {
        match own.get_mut(&own_rule(call)).filter(|left| **left > 0 && !is_library(call)) {
            Some(left) => {
                *left -= 1;
                false
            }
            None => true,
        }
    });
    let Difference { missing, unused } =
        compare(&seen, &rules(&MODES), |call| if is_library(call) { Thread::Worker } else { Thread::Caller });
    assert!(missing.is_empty(), "no rule for {missing:#?}");
    let adds = |rule: &&Rule| MODES.iter().flat_map(|mode| mode.adds()).any(|own| own.is_like(rule));
    let unused: Vec<_> = unused.iter().filter(adds).collect();
    assert!(unused.is_empty(), "never used: {unused:#?}");
}

#[test]
fn a_vmm_under_exactly_the_filter_for_exec_is_mapped_and_lives() {
    let Some(library) = library() else { return };
    let own = own_calls();
    let output = run(&own.into_keys().collect::<Vec<_>>().join(" "), Some(library), Seccomp::Trust);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    assert!(said.contains(r#""event":"mapped""#) && said.contains(r#""event":"ended""#), "{said}");
}

#[test]
fn a_vmm_in_a_chroot_without_proc_is_told_which_file_is_missing_and_runs() {
    let Some(library) = library() else { return };
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root may change its root");
    }
    let directory = std::env::temp_dir().join(format!("premap-preload-jail-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    for seccomp in [Seccomp::StepAside, Seccomp::Trust] {
        let output = run(&format!("{CHROOT}{}", directory.display()), Some(library.clone()), seccomp);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
        let lines: Vec<_> = said.lines().filter(|line| line.starts_with("premap exec: ")).collect();
        let [line] = lines[..] else { panic!("{said}") };
        assert!(line.contains("/proc/self/smaps") && line.contains("os error 2"), "{line}");
        assert!(!line.contains("confined by seccomp"), "{line}");
    }
    std::fs::remove_dir(&directory).unwrap();
}
