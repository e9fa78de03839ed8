//! A chroot without `/proc`, and a process that may start no thread.
// UNSAFETY: the child gives up what it is root for.
#![expect(unsafe_code, reason = "setuid and setrlimit")]

use std::time::Duration;

use premap::Touch;
use premap::seccomp::Mode;
use premap::working_set::{RecordError, Recorder};
use premap_address::{Gpa, PAGE_SIZE};
use premap_guest::{Backing, Memory};

use crate::{child, modes, seccomp, skip};

/// Who owns nothing.
const NOBODY: libc::uid_t = 65534;

fn recorder(memory: &Memory) -> Result<Recorder, RecordError> {
    Recorder::new(&[memory.region(Gpa::new(0), Touch::Write)])
}

fn memory() -> Memory {
    Memory::new(16 * PAGE_SIZE, Backing::Anonymous).unwrap()
}

/// Changes to a directory in which there is nothing.
fn enter_chroot() {
    let directory = std::env::temp_dir().join("root");
    std::fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chroot(directory).unwrap();
    std::env::set_current_dir("/").unwrap();
    assert!(std::fs::read_dir("/").unwrap().next().is_none());
}

pub(crate) fn in_chroot(mode: Mode) {
    if mode == Mode::Recorder {
        let memory = memory();
        enter_chroot();
        let error = recorder(&memory).unwrap_err();
        assert!(matches!(error, RecordError::Open { path: "/proc/self/maps", .. }), "{error:?}");
        let said = error.to_string();
        let parts = ["/proc/self/maps: ", "os error 2", "mount proc on /proc"];
        assert!(parts.iter().all(|part| said.contains(part)) && said.lines().count() == 1, "{said}");
        return;
    }
    modes::run(mode, |work| {
        enter_chroot();
        work();
    });
}

/// As of now the process may start no thread.
fn allow_no_thread() {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the calls change limits and owner of this process, and setrlimit reads one rlimit.
    let done =
        unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const none) == 0 && libc::setuid(NOBODY) == 0 };
    assert!(done, "{}", std::io::Error::last_os_error());
}

pub(crate) fn without_threads() {
    let memory = memory();
    let mut recorder = recorder(&memory).unwrap();
    allow_no_thread();
    let mut ran = false;
    let error = recorder.watch(Duration::from_millis(1), || ran = true).unwrap_err();
    assert!(matches!(error, RecordError::Spawn(_)) && !ran, "{error:?}");
    let said = error.to_string();
    assert!(said.contains("os error 11") && said.contains("pids.max"), "{said}");
    // A VMM that looks for itself goes on.
    recorder.look().unwrap();
}

#[track_caller]
fn check(what: &str, mode: Mode) {
    // SAFETY: geteuid has no conditions.
    if unsafe { libc::geteuid() } != 0 {
        return skip("only root may change its root and its owner");
    }
    let output = child::run(what, mode, "");
    assert!(output.status.success(), "{mode:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_engine_works_in_a_chroot_without_proc() {
    for mode in seccomp::MODES.into_iter().filter(|mode| *mode != Mode::Recorder) {
        check("chroot", mode);
    }
}

#[test]
fn a_recorder_in_a_chroot_says_which_file_is_missing_and_why() {
    check("chroot", Mode::Recorder);
}

#[test]
fn a_recorder_that_can_have_no_thread_says_so_and_begins_nothing() {
    check("no threads", Mode::Recorder);
}
