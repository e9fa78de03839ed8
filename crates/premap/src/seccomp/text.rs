//! The table as text.

use std::fmt::Write;

use super::{Mode, Need, Rule, Thread};

/// The table in Markdown, a row for each mode and the notes below it: what README and documentation show.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from(
        "| mode | on the thread that calls | on the threads that premap starts |\n|---|---|---|\n",
    );
    for mode in Mode::ALL {
        let cell = |thread| {
            let mut calls: Vec<_> = mode.adds().iter().filter(|rule| rule.thread == thread).collect();
            calls.sort_by_key(|rule| matches!(rule.need, Need::Sometimes(_)));
            calls.into_iter().map(call).collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(text, "| {} | {} | {} |", what(mode), cell(Thread::Caller), cell(Thread::Worker));
    }
    text.push_str(
        "\n*In italics*: may be answered with an errno such as EPERM. In brackets: what only some C libraries and machines \
         call;\n`premap::seccomp` says which.\n",
    );
    text
}

/// The mode as its row begins.
const fn what(mode: Mode) -> &'static str {
    match mode {
        Mode::Threads => "every mode: starting threads",
        Mode::Look => "`Engine::run`: what lies behind the memory",
        Mode::Foreground => "`Engine::run`, besides",
        Mode::Alone => "the same where there can be no thread, besides",
        Mode::Vm => "`Engine::vm`, besides",
        Mode::HostMemory => "`Budget::within_host_memory`, besides",
        Mode::Gate => "`Engine::gate`, besides",
        Mode::Pace => "`Engine::pace`, besides",
        Mode::Background => "`Engine::background`, besides that of `run`",
        Mode::Recorder => "`working_set::Recorder`, besides starting threads",
        Mode::ExecStart => "`premap exec`, when the VMM opens KVM, besides starting threads",
        Mode::Exec => "`premap exec`, then; its own threads also all of `run`, `vm` and `within_host_memory`",
    }
}

fn call(rule: &Rule) -> String {
    let Rule { syscall, argument, need, .. } = rule;
    let call = match argument {
        Some(argument) => format!("`{}` {} {}", syscall.name, number(argument.value), argument.name),
        None => format!("`{}`", syscall.name),
    };
    match need {
        Need::Always => call,
        Need::OrErrno => format!("*{call}*"),
        Need::Sometimes(_) => format!("({call})"),
    }
}

/// A request as it is usually written, an advice likewise.
fn number(value: u32) -> String {
    if value > 0xff { format!("{value:#x}") } else { value.to_string() }
}

/// The calls of these rules in one sentence's part, whatever the thread: `ioctl 0xaece, madvise 22 and 23, futex`.
#[must_use]
pub fn list(rules: &[Rule]) -> String {
    let mut calls: Vec<(&str, Vec<u32>)> = Vec::new();
    for rule in rules {
        let name = rule.syscall.name;
        let at = calls.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
            calls.push((name, Vec::new()));
            calls.len() - 1
        });
        let values = &mut calls[at].1;
        if let Some(argument) = rule.argument.filter(|argument| !values.contains(&argument.value)) {
            values.push(argument.value);
        }
    }
    // Those with arguments first.
    calls.sort_by_key(|(_, values)| values.is_empty());
    let call = |(name, values): (&str, Vec<u32>)| {
        let values: Vec<_> = values.into_iter().map(number).collect();
        match values.split_last() {
            None => name.to_owned(),
            Some((last, [])) => format!("{name} {last}"),
            Some((last, others)) => format!("{name} {} and {last}", others.join(", ")),
        }
    };
    calls.into_iter().map(call).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::rules;

    #[test]
    fn the_documentation_shows_this_table() {
        let table = markdown();
        let text = include_str!("table.md");
        assert!(text.contains(&table), "table.md has another table; paste this one in:\n\n{table}");
        let readme = include_str!("../../../../README.md");
        assert!(readme.contains("(crates/premap/src/seccomp/table.md)"), "the README leads to the table");
    }

    #[test]
    fn a_list_names_each_call_once_with_its_arguments() {
        let list = list(&rules(&[Mode::Foreground]));
        let first = "ioctl 0xc040aed5, 0x8138ae83 and 0x4138ae84, madvise 22, 23, ";
        assert!(list.starts_with(first), "{list}");
        assert_eq!(list.matches("futex").count(), 1, "{list}");
    }
}
