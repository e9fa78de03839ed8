//! One line on stderr, in one write, so that lines of several threads stay whole.
//!
//! A thread of the VMM's may run under a filter that kills it for a `write`, so the library's own thread writes. Where
//! there is none, nothing is said, with one exception: what keeps the library from beginning is said by the thread that
//! has just opened `/dev/kvm`, is about to make a VM, and has not yet confined itself for running one.

use crate::{helper, outlet, process};

/// Says something that failed, or what was done where the user asked to hear it.
pub(crate) fn say(text: &str) {
    let line = line(text);
    match process::current() {
        Some(process) if !helper::is_own_thread() => {
            // Where the thread has ended there is nobody to say it.
            let _ = process.clerk.hand(move |_| write(&line));
        }
        _ => write(&line),
    }
}

fn line(text: &str) -> String {
    format!("premap exec: {}\n", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn write(line: &str) {
    // Where stderr is closed, or nobody reads it, there is nobody to tell.
    let _ = outlet::write(&std::io::stderr(), line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_one_line() {
        assert_eq!(line("a\n  b\tc"), "premap exec: a b c\n");
    }
}
