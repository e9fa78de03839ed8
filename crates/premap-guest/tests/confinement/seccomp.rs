//! Each mode under exactly the filter that its rules describe, which kills for every other call.
//!
//! What a child was killed for can't be asked of it. So the calls of each mode are observed, too: each must have a rule, and
//! each rule must have been met, by the thread that it speaks of.

use std::os::unix::process::ExitStatusExt;

use confinement::{Difference, allow, apply_filter, compare, observe, refuse};
use premap::seccomp::{Mode, Need, Rule, Thread, rules};

use crate::host::{self, Kvm};
use crate::{child, modes, skip};

/// What is run here; `premap exec` has its own test, beside the library that it preloads.
pub(crate) const MODES: [Mode; 8] = [
    Mode::Foreground,
    Mode::Alone,
    Mode::Vm,
    Mode::HostMemory,
    Mode::Gate,
    Mode::Pace,
    Mode::Background,
    Mode::Recorder,
];

/// What is left out of the filter, or put before it: nothing, or all that may be answered with an errno.
const EXACT: &str = "exact";
const REFUSING: &str = "refusing";

pub(crate) fn child(mode: Mode, detail: &str) {
    let mut rules = taken(mode);
    let may_fail: Vec<_> = rules.iter().filter(|rule| rule.need == Need::OrErrno).copied().collect();
    let starts: Vec<_> = rules.iter().filter(|rule| starts_thread(rule.syscall.number)).copied().collect();
    if let Ok(index) = detail.parse::<usize>() {
        let out = rules[index];
        rules.retain(|rule| (rule.syscall, rule.argument) != (out.syscall, out.argument));
    }
    // The end is the child's own.
    let filter = allow(&rules, &[libc::SYS_exit_group]).unwrap();
    let refusals = [
        (detail == REFUSING).then(|| refuse(&may_fail, libc::EPERM).unwrap()),
        (mode == Mode::Alone).then(|| refuse(&starts, libc::EAGAIN).unwrap()),
    ];
    modes::run(mode, |work| {
        // In this order, since the last allows no other.
        refusals.iter().flatten().chain([&filter]).for_each(|filter| apply_filter(filter).unwrap());
        work();
        child::end();
    });
}

fn starts_thread(number: i64) -> bool {
    [libc::SYS_clone, libc::SYS_clone3].contains(&number)
}

/// The rules of what is done in a mode: a gate is for what goes on in the background.
fn taken(mode: Mode) -> Vec<Rule> {
    if mode == Mode::Gate { rules(&[mode, Mode::Background]) } else { rules(&[mode]) }
}

/// Which rules a mode must meet: those that it adds, and the plainest also those that it builds on.
fn is_own(mode: Mode, rule: &Rule) -> bool {
    let adds = |mode: Mode| mode.adds().iter().any(|own| own.is_like(rule));
    adds(mode) || (mode == Mode::Foreground && (adds(Mode::Threads) || adds(Mode::Look)))
}

/// Whether this machine has what it takes to meet a rule.
fn is_in_reach(rule: &Rule, kvm: Kvm) -> bool {
    // Without KVM the first ioctl of each thread is ENOTTY, and what follows from its success is not done.
    let request = rule.argument.map(|argument| argument.name);
    let follows = ["read", "lseek", "statx", "close"].contains(&rule.syscall.name)
        || request == Some("KVM_SET_SREGS")
        || (rule.thread == Thread::Caller && request == Some("KVM_PRE_FAULT_MEMORY"));
    kvm == Kvm::Present || !follows
}

/// What was seen of a mode, beside its rules; nothing where that can't be.
fn difference(mode: Mode) -> Option<Difference> {
    let mut observed = None;
    let refused: &[i64] = if mode == Mode::Alone { &[libc::SYS_clone, libc::SYS_clone3] } else { &[] };
    modes::run(mode, |work| observed = Some(observe(work, refused)));
    match observed.unwrap() {
        Ok(((), seen)) => Some(compare(&seen, &taken(mode), |call| {
            if call.thread == seen.first { Thread::Caller } else { Thread::Worker }
        })),
        Err(error) => {
            skip(&format!("seccomp's notifications: {error}"));
            None
        }
    }
}

#[test]
fn every_mode_runs_under_exactly_its_own_filter() {
    for mode in MODES {
        let output = child::run("filter", mode, EXACT);
        if !output.status.success() {
            let missing = difference(mode).map(|difference| difference.missing);
            panic!("{mode:?} has no rule for {missing:?}: {}\n{}", output.status, text(&output.stderr));
        }
    }
}

#[test]
fn every_call_has_a_rule_and_every_rule_a_call_on_its_own_thread() {
    let kvm = host::with(|host| host.kvm);
    for mode in MODES {
        let Some(Difference { missing, unused }) = difference(mode) else { return };
        assert!(missing.is_empty(), "{mode:?} has no rule for {missing:?}");
        let unused: Vec<_> =
            unused.iter().filter(|rule| is_own(mode, rule) && is_in_reach(rule, kvm)).collect();
        assert!(unused.is_empty(), "{mode:?} has rules that are never used: {unused:?}");
    }
}

#[test]
fn without_any_one_of_its_rules_a_filter_kills() {
    let kvm = host::with(|host| host.kvm);
    for mode in MODES {
        for (index, rule) in taken(mode).iter().enumerate() {
            if matches!(rule.need, Need::Sometimes(_)) || !is_own(mode, rule) || !is_in_reach(rule, kvm) {
                continue;
            }
            let status = child::run("filter", mode, &index.to_string()).status;
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{mode:?} lives without {rule:?}: {status}");
        }
    }
}

#[test]
fn what_may_be_answered_with_an_errno_is_done_without() {
    for mode in MODES.into_iter().filter(|mode| taken(*mode).iter().any(|rule| rule.need == Need::OrErrno)) {
        let output = child::run("filter", mode, REFUSING);
        assert!(output.status.success(), "{mode:?}: {}\n{}", output.status, text(&output.stderr));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
