//! What was seen beside what the rules say.

use std::collections::BTreeSet;

use premap::seccomp::{Need, Rule, Thread};

use crate::observe::{Call, Observed};

/// Where rules and calls differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Calls that no rule allows.
    pub missing: BTreeSet<String>,
    /// Rules for calls that were not made, though they always are.
    pub unused: Vec<Rule>,
}

/// Compares calls with rules; `who` tells which thread made a call.
#[must_use]
pub fn compare(seen: &Observed, rules: &[Rule], who: impl Fn(&Call) -> Thread) -> Difference {
    let mut used = vec![false; rules.len()];
    let mut difference = Difference::default();
    for call in &seen.calls {
        let thread = who(call);
        match rules.iter().position(|rule| rule.thread == thread && allows(rule, call)) {
            Some(index) => used[index] = true,
            None => {
                difference.missing.insert(name(thread, call));
            }
        }
    }
    let unused =
        rules.iter().zip(used).filter(|(rule, used)| !used && !matches!(rule.need, Need::Sometimes(_)));
    difference.unused = unused.map(|(rule, _)| *rule).collect();
    difference
}

fn allows(rule: &Rule, call: &Call) -> bool {
    let argument = rule.argument.is_none_or(|argument| {
        // The kernel takes 32 bits of a request and of an advice.
        call.arguments[usize::from(argument.index)] & u64::from(u32::MAX) == u64::from(argument.value)
    });
    rule.syscall.number == call.number && argument
}

/// The call as a rule would have it, by the name that another mode's rule gives it or by its number.
fn name(thread: Thread, call: &Call) -> String {
    let all = premap::seccomp::rules(&premap::seccomp::Mode::ALL);
    let known = all.iter().find(|rule| rule.syscall.number == call.number);
    let name =
        known.map_or_else(|| format!("system call {}", call.number), |rule| rule.syscall.name.to_owned());
    let [first, second, third, ..] = call.arguments;
    let argument = match call.number {
        libc::SYS_ioctl => format!(" {second:#x}"),
        libc::SYS_madvise => format!(" {third}"),
        libc::SYS_prctl | libc::SYS_clock_gettime => format!(" {first}"),
        _ => String::new(),
    };
    format!("{thread:?}: {name}{argument}")
}
