//! The command below limits on memory: it is not killed for what it takes, but says what it can't have, and why.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../premap-guest/tests/cgroup/mod.rs"]
mod cgroup;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cgroup::Cgroup;

fn premap() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_premap"))
}

fn output(mut command: Command, arguments: &str) -> Output {
    command.args(arguments.split(' ')).output().unwrap()
}

/// Runs the command in a cgroup, where it must refuse in one line.
#[track_caller]
fn refused(group: &Cgroup, arguments: &str, parts: &[&str]) {
    let done = output(group.command(premap()), arguments);
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{arguments}: {} {stderr}", done.status);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for part in parts.iter().copied().chain([group.told().as_str(), "give less, such as", "raise the limit"])
    {
        assert!(stderr.contains(part), "{part:?} is not in {stderr:?}");
    }
}

/// The clean example of premap-tdx's tests, unpacked.
fn firmware() -> PathBuf {
    let packed = include_bytes!("../../premap-tdx/tests/data/gce_clean_example_2m.fd.gz");
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut image).unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host_memory.fd");
    std::fs::write(&path, image).unwrap();
    path
}

#[test]
fn a_guest_larger_than_its_cgroup_is_refused_and_not_killed() {
    let Some(group) = Cgroup::new("run", 64 << 20) else { return };
    for backing in ["anon", "thp", "memfd"] {
        let arguments = format!("run --backend soft --memory 512M --backing {backing}");
        refused(&group, &arguments, &["--memory 512M", "64 MiB)", "such as 16M"]);
    }
    refused(&group, "record --backend soft --memory 512M --out /dev/null", &["--memory 512M", "64 MiB)"]);
    let done = output(group.command(premap()), "run --backend soft --memory 8M --strategy two-stage");
    assert!(done.status.success(), "what fits runs: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_limit_on_hugetlb_pages_is_named_and_not_met_by_the_guest() {
    let files = ["hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"];
    let Some(group) = Cgroup::or_skip("hugetlb", "huge", files, 4 << 20) else { return };
    let arguments = "run --backend soft --backing hugetlb --memory 16M";
    refused(&group, arguments, &["--memory 16M", "hugetlb limit", "hugetlb.2MB", "such as 4M"]);
}

#[test]
fn a_td_whose_model_is_larger_than_its_cgroup_is_refused_and_not_killed() {
    let Some(group) = Cgroup::new("td", 1 << 30) else { return };
    let arguments = format!("td run {} --memory 256G", firmware().display());
    refused(&group, &arguments, &["--memory 256G", "the model of so large a TD takes 4 GiB", "1024 MiB)"]);
}

#[test]
fn doctor_names_the_tightest_limit() {
    let Some(group) = Cgroup::new("doctor", 200 << 20) else { return };
    let done = output(group.command(premap()), "doctor --json");
    let verdict: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let checks = verdict["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["check"] == "memory limits").unwrap();
    assert_eq!(check["status"], "limited");
    assert!(check["result"].as_str().unwrap().contains(&group.told()), "{check}");
}

#[test]
fn an_address_space_that_is_too_small_is_named() {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("ulimit -v 500000 && exec \"$@\"").arg("sh").arg(premap());
    let done = output(shell, "run --backend soft --memory 1G");
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--memory 1G") && stderr.contains("RLIMIT_AS"), "{stderr}");
}

#[test]
fn what_never_ends_or_never_comes_is_not_read_for_ever() {
    let pipe = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("pipe-{}", std::process::id()));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let pipe_name = pipe.to_str().unwrap();
    let cases = [
        ("run --working-set FILE", "/dev/zero", "longer than 64 MiB"),
        ("run --guest linux --kernel FILE", "/dev/zero", "longer than 256 MiB"),
        ("td measure FILE", "/dev/zero", "longer than 64 MiB"),
        ("run --working-set FILE", pipe_name, "a pipe"),
        ("run --guest linux --kernel FILE", pipe_name, "a pipe"),
        ("td measure FILE", pipe_name, "a pipe"),
        ("exec -- FILE", pipe_name, "a pipe"),
        ("run --working-set FILE", "/", "a directory"),
        ("td measure FILE", "/", "a directory"),
    ];
    for (arguments, file, expected) in cases {
        let done = output(Command::new(premap()), &arguments.replace("FILE", file));
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(
            (done.status.code(), stderr.lines().count()),
            (Some(1), 1),
            "{arguments} {file}: {stderr}"
        );
        assert!(stderr.contains(expected) && stderr.contains(file), "{arguments} {file}: {stderr}");
    }
    std::fs::remove_file(pipe).unwrap();
}
