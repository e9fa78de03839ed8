//! The child: what it is told by its parent, and how it ends.
// UNSAFETY: an end that takes one system call.
#![expect(unsafe_code, reason = "_exit")]

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use premap::seccomp::Mode;

use crate::{jail, seccomp};

/// What the child is told, in three variables: what to do, in which mode, and a detail.
const WHAT: &str = "PREMAP_TEST_CHILD";
const MODE: &str = "PREMAP_TEST_MODE";
const DETAIL: &str = "PREMAP_TEST_DETAIL";

/// Runs a child, which has a directory of its own for what it leaves behind.
pub(crate) fn run(what: &str, mode: Mode, detail: &str) -> Output {
    static RUN: AtomicU32 = AtomicU32::new(0);
    let name = format!("premap-child-{}-{}", std::process::id(), RUN.fetch_add(1, Ordering::Relaxed));
    let directory = std::env::temp_dir().join(name);
    std::fs::create_dir(&directory).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "child::child", "--nocapture", "--test-threads=1"]);
    command.env(WHAT, what).env(MODE, format!("{mode:?}")).env(DETAIL, detail).env("TMPDIR", &directory);
    let output = command.output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    output
}

#[test]
#[ignore = "the child that the other tests run"]
fn child() {
    let [what, mode, detail] = [WHAT, MODE, DETAIL].map(|name| std::env::var(name).unwrap());
    let mode = Mode::ALL.into_iter().find(|known| format!("{known:?}") == mode).unwrap();
    match what.as_str() {
        "filter" => seccomp::child(mode, &detail),
        "chroot" => jail::in_chroot(mode),
        "no threads" => jail::without_threads(),
        other => panic!("{other}"),
    }
}

/// Ends the child, at once and well.
pub(crate) fn end() -> ! {
    // SAFETY: _exit has no conditions.
    unsafe { libc::_exit(0) }
}
