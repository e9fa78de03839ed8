//! One line on stderr, in one write, so that lines of several threads stay whole.

use std::io::Write;

/// Says something that failed, or what was done where the user asked to hear it.
pub(crate) fn say(text: &str) {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = format!("premap exec: {text}\n");
    // Where stderr is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
