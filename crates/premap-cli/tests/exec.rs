//! `premap exec`: what it refuses, and that it becomes the program otherwise.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A library to preload that changes nothing: the C library itself. What premap's own does is its own tests' affair.
fn harmless() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let path =
        maps.lines().find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains("/libc.so")));
    PathBuf::from(path.expect("this program is linked dynamically"))
}

struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn exec(library: &Path, arguments: &[&str]) -> Done {
    let output = Command::new(env!("CARGO_BIN_EXE_premap"))
        .arg("exec")
        .args(arguments)
        .env("PREMAP_PRELOAD", library)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Done { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

#[track_caller]
fn check_refused(library: &Path, arguments: &[&str], code: i32, parts: &[&str]) {
    let done = exec(library, arguments);
    assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    for part in parts {
        assert!(done.stderr.contains(part), "{part:?} is not in {:?}", done.stderr);
    }
}

/// A directory of the test's own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("premap-exec-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The header of a program without a dynamic linker.
fn static_program() -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[16] = 2;
    bytes[18] = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    (bytes[32], bytes[54], bytes[56], bytes[64]) = (64, 56, 1, 1);
    bytes
}

#[test]
fn a_static_program_is_refused_with_the_way_out() {
    let directory = Directory::new("static");
    let vmm = directory.file("vmm", &static_program(), 0o755);
    check_refused(
        &harmless(),
        &["--", &vmm, "-m", "256M"],
        2,
        &[&vmm, "linked statically", "link the premap crate"],
    );
}

#[test]
fn what_is_not_there_is_named_with_a_remedy() {
    check_refused(&harmless(), &["--", "no-such-vmm"], 2, &["no-such-vmm", "PATH"]);
    check_refused(&harmless(), &["--", "/no/such/vmm"], 1, &["/no/such/vmm", "os error 2"]);
    check_refused(Path::new("/no/library.so"), &["--", "true"], 2, &["PREMAP_PRELOAD /no/library.so"]);
    check_refused(
        &harmless(),
        &["--report", "/no/report", "--", "true"],
        1,
        &["--report /no/report", "os error 2"],
    );
    check_refused(&harmless(), &["--report", "fd:x", "--", "true"], 2, &["--report fd:x", "fd:3"]);
    check_refused(&harmless(), &["--report", "fd:77", "--", "true"], 1, &["--report fd:77", "os error 9"]);
    check_refused(&harmless(), &["--chunk", "5", "--", "true"], 2, &["--chunk 5", "4 KiB"]);
    check_refused(&harmless(), &["--follow", "5", "--", "true"], 2, &["--follow 5", "500ms"]);
    check_refused(&harmless(), &[], 2, &["VMM", "--help"]);
}

#[test]
fn the_command_becomes_the_program() {
    let (library, directory) = (harmless(), Directory::new("becomes"));
    let report = directory.file("report", b"old", 0o644);
    let script = "echo $0 $1; echo said >&2; echo $LD_PRELOAD; echo $PREMAP_EXEC; echo $$; exit 5";
    let done = exec(
        &library,
        &["--report", &report, "--strategy", "none", "--", "sh", "-c", script, "--strategy", "x"],
    );
    assert_eq!((done.code, done.stderr.as_str()), (Some(5), "said\n"));
    let lines: Vec<_> = done.stdout.lines().collect();
    assert_eq!(lines[..2], ["--strategy x", library.canonicalize().unwrap().to_str().unwrap()]);
    let settings = premap_exec_settings::Settings::decode(lines[2]).unwrap();
    assert_eq!(settings.strategy, premap_exec_settings::Strategy::None);
    assert_eq!(settings.report, Some(premap_exec_settings::Report::File(PathBuf::from(&report))));
    let report = fs::read_to_string(&report).unwrap();
    assert_eq!(report.lines().count(), 1, "a report begins anew: {report}");
    let started: serde_json::Value = serde_json::from_str(&report).unwrap();
    let pid = settings.process.unwrap();
    assert_eq!(started, serde_json::json!({"version": 1, "vmm": "sh", "pid": pid, "event": "started"}));
    assert_eq!(lines[3], pid.to_string(), "the command becomes the program");
}

#[test]
fn a_report_s_path_need_not_be_text() {
    use std::os::unix::ffi::OsStringExt;
    let directory = Directory::new("bytes");
    let mut path = directory.0.clone().into_os_string().into_vec();
    path.extend(b"/report-\xff");
    let path = std::ffi::OsString::from_vec(path);
    let status = Command::new(env!("CARGO_BIN_EXE_premap"))
        .args(["exec", "--report"])
        .arg(&path)
        .args(["--", "true"])
        .env("PREMAP_PRELOAD", harmless())
        .env_remove("LD_PRELOAD")
        .status()
        .unwrap();
    assert!(status.success() && fs::read_to_string(&path).unwrap().contains("started"));
}

#[test]
fn a_script_is_run_by_its_interpreter() {
    let directory = Directory::new("script");
    let script = directory.file("vmm.sh", b"#!/bin/sh\nexit 6\n", 0o755);
    assert_eq!(exec(&harmless(), &["--", &script]).code, Some(6));
}

#[test]
fn libraries_that_were_preloaded_already_keep_their_place() {
    let library = harmless();
    let output = Command::new(env!("CARGO_BIN_EXE_premap"))
        .args(["exec", "--", "sh", "-c", "echo $LD_PRELOAD"])
        .env("PREMAP_PRELOAD", &library)
        .env("LD_PRELOAD", &library)
        .output()
        .unwrap();
    let whole = library.canonicalize().unwrap();
    let expected = format!("{}:{}\n", whole.display(), library.display());
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}
