//! A host that gives no more threads: one clear line, and an end.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Nobody else's, so that this process's own threads are all that count.
const USER: u32 = 61_357;

/// What each such line has.
const WORDS: [&str; 4] = ["thread", "os error 11", "ulimit -u", "pids.max"];

/// Runs `premap` as a user that may have so many threads, itself included; a hang is exit code 124. Whoever is not root is
/// this user, whose other processes count: what is refused then is the first thread.
fn limited(threads: u32, arguments: &str) -> Output {
    let mut command = Command::new("timeout");
    command.arg("120").arg("prlimit");
    if std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nUid:\t0\t0\t")) {
        // `timeout` is the user's too.
        command.arg(format!("--nproc={}", threads + 1)).uid(USER).gid(USER);
    } else {
        command.arg("--nproc=1");
    }
    command.arg(env!("CARGO_BIN_EXE_premap")).args(arguments.split(' ')).current_dir("/").output().unwrap()
}

#[track_caller]
fn refused(threads: u32, arguments: &str) {
    let done = limited(threads, arguments);
    let (stdout, stderr) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr).into_owned());
    assert_eq!((done.status.code(), stdout.as_ref()), (Some(1), ""), "{arguments}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{arguments}: {stderr}");
    for part in WORDS {
        assert!(stderr.contains(part), "{arguments}: {part:?} is not in {stderr:?}");
    }
}

/// Whether a process can be limited here at all, and the command be reached by the other user.
fn can_limit() -> bool {
    let done = limited(8, "--version");
    let can = done.status.success();
    if !can {
        eprintln!("skipped: prlimit runs nothing here: {}", String::from_utf8_lossy(&done.stderr).trim());
    }
    can
}

#[test]
fn a_run_without_a_thread_for_each_vcpu_says_so_and_ends() {
    if !can_limit() {
        return;
    }
    for threads in [1, 4] {
        refused(threads, "run --backend soft --memory 4M --vcpus 8 --strategy demand");
    }
    // The engine may have taken what threads there are.
    refused(4, "run --backend soft --memory 4M --vcpus 8 --strategy background");
    let done = limited(1, "run --backend soft --memory 4M --strategy demand");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(stderr.contains("demand: 1 vCPU needs a thread, "), "{stderr}");
}

#[test]
fn a_td_without_a_thread_for_each_vcpu_says_so_and_ends() {
    if !can_limit() {
        return;
    }
    let packed = include_bytes!("../../premap-tdx/tests/data/gce_clean_example_2m.fd.gz");
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut image).unwrap();
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("threads.fd");
    std::fs::write(&file, image).unwrap();
    refused(4, &format!("td run {} --memory 16M --vcpus 8", file.display()));
}

#[test]
fn a_recording_without_threads_says_so_and_ends() {
    if !can_limit() {
        return;
    }
    for vcpus in [1, 8] {
        let out = format!("{}/threads-{vcpus}.premap", std::env::temp_dir().display());
        let record = format!("record --backend soft --memory 4M --vcpus {vcpus} --out {out}");
        for threads in [1, 2] {
            refused(threads, &record);
        }
        assert!(!std::path::Path::new(&out).exists(), "half a recording was written");
    }
}
