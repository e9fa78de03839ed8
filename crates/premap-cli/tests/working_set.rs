//! `premap record` and `premap run --working-set`, on the software KVM.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod command;

use std::path::PathBuf;

use command::premap;
use serde_json::{Value, json};

const MEMORY: u64 = 4 << 20;

/// A file of this test's own, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("premap-{name}-{}", std::process::id())))
    }

    fn path(&self) -> std::path::Display<'_> {
        self.0.display()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[track_caller]
fn record(name: &str, flags: &str) -> (Scratch, Value) {
    let file = Scratch::new(name);
    let done = premap(&format!("record --backend soft --memory 4M --json --out {} {flags}", file.path()));
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{}", done.stdout);
    let told = serde_json::from_str(&done.stdout).unwrap();
    (file, told)
}

#[track_caller]
fn refused(arguments: &str, parts: &[&str]) {
    let done = premap(arguments);
    assert_eq!((done.code, done.stdout.as_str()), (Some(2), ""), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    for part in parts {
        assert!(done.stderr.contains(part), "{part:?} is not in {:?}", done.stderr);
    }
}

#[test]
fn what_was_recorded_is_told_and_mapped_within_its_budget() {
    let (file, told) = record("mapped", "--order random");
    assert_eq!((&told["bytes"], &told["written_bytes"]), (&json!(MEMORY), &json!(MEMORY)));
    assert!(told["method"].is_string() && told["looks"].as_u64().unwrap() >= 2, "{told}");
    // Four times the memory, of which the first quarter was recorded.
    let done = premap(&format!(
        "run --backend soft --memory 16M --order random --strategy two-stage --json --budget working-set --working-set {}",
        file.path()
    ));
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{}", done.stdout);
    let rows: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((&rows[0]["host"]["bytes"], &rows[0]["second"]["bytes"]), (&json!(MEMORY), &json!(MEMORY)));
    assert_eq!(rows[0]["guest"]["faults"], (16 << 20) / 4096 - MEMORY / 4096);
}

#[test]
fn reads_are_recorded_as_reads() {
    let (_, told) = record("read", "--touch read");
    assert_eq!((&told["bytes"], &told["read_bytes"]), (&json!(MEMORY), &json!(MEMORY)));
}

#[test]
fn a_budget_alone_limits_what_is_mapped() {
    let done = premap("run --backend soft --memory 4M --budget 1M --strategy two-stage --json");
    let rows: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!((&rows[0]["second"]["bytes"], &rows[0]["guest"]["faults"]), (&json!(1 << 20), &json!(768)));
}

#[test]
fn a_file_that_does_not_fit_is_refused_before_anything_runs() {
    let (file, _) = record("misfit", "--order random");
    let run = |flags: &str| format!("run --backend soft {flags} --working-set {}", file.path());
    refused(&run("--memory 4M"), &["--working-set", "another image"]);
    refused(&run("--memory 2M --order random"), &["--working-set", "is not in this VM's memory"]);
    refused(&run("--memory 4M --backing hugetlb --order random").replace("4M", "1M"), &["2 MiB"]);
    let mut bytes = std::fs::read(&file.0).unwrap();
    for (change, expected) in [
        (Box::new(|bytes: &mut Vec<u8>| bytes[70] ^= 4) as Box<dyn Fn(&mut Vec<u8>)>, "damaged"),
        (Box::new(|bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1)), "cut short"),
        (Box::new(|bytes: &mut Vec<u8>| bytes[8] = 9), "version 9"),
        (Box::new(Vec::clear), "not a working set"),
    ] {
        change(&mut bytes);
        std::fs::write(&file.0, &bytes).unwrap();
        refused(&run("--memory 4M --order random"), &["--working-set", expected]);
    }
    refused("run --backend soft --budget working-set", &["--budget working-set", "--working-set FILE"]);
}

#[test]
fn nothing_is_mapped_ahead_while_it_is_recorded() {
    for flag in ["--strategy two-stage", "--chunk 2M", "--deadline 1s", "--budget 1M"] {
        let name = flag.split(' ').next().unwrap();
        refused(&format!("record --out /nowhere/file {flag}"), &[name, "no such flag"]);
    }
}
