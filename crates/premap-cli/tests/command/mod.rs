//! The built command, run.

use std::process::{Command, Output, Stdio};

/// What a run of the command left.
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `premap` with arguments that are separated by single spaces.
pub(crate) fn premap(arguments: &str) -> Done {
    let output = Command::new(env!("CARGO_BIN_EXE_premap"))
        .args(arguments.split(' ').filter(|argument| !argument.is_empty()))
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .output()
        .expect("the command was built with this test");
    let Output { status, stdout, stderr } = output;
    let text = |bytes| String::from_utf8(bytes).expect("the command writes UTF-8");
    Done { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}
