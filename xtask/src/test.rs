//! `cargo xtask test`: every check of the project, in order, up to the first that fails.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::lab::kernel::Line;
use crate::suite;

/// A part of the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    /// The formatting
    Fmt,
    /// The lints, warnings as errors
    Clippy,
    /// The documentation, warnings as errors
    Docs,
    /// Tests on this machine
    Host,
    /// Model checks of the lock protocols
    Loom,
    /// Tests and acceptance checks on real kernels in the lab
    Lab,
}

const ALL: [Step; 6] = [Step::Fmt, Step::Clippy, Step::Docs, Step::Host, Step::Loom, Step::Lab];

/// Flags of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only this part; may be given more than once
    #[arg(long, value_enum, value_name = "PART")]
    only: Vec<Step>,
    /// Kernels of the lab; may be given more than once
    #[arg(long, value_name = "SERIES", default_values = ["6.12", "latest"])]
    kernel: Vec<Line>,
}

/// Runs the checks and tells which one failed.
pub(crate) fn run(options: &Options) -> ExitCode {
    for step in ALL.into_iter().filter(|step| options.only.is_empty() || options.only.contains(step)) {
        println!("\n== {step:?}");
        let started = Instant::now();
        if let Err(error) = perform(step, options) {
            eprintln!("\n== {step:?} failed: {error:#}");
            return ExitCode::FAILURE;
        }
        println!("== {step:?} passed in {:.0} s", started.elapsed().as_secs_f64());
    }
    ExitCode::SUCCESS
}

fn perform(step: Step, options: &Options) -> Result<()> {
    match step {
        Step::Fmt => cargo(&["fmt", "--all", "--check"], &[]),
        Step::Clippy => cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]),
        Step::Docs => cargo(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings".into())]),
        Step::Host => cargo(&["test", "--workspace"], &[]),
        Step::Loom => loom(),
        Step::Lab => suite::run(&options.kernel),
    }
}

fn cargo(arguments: &[&str], environment: &[(&str, OsString)]) -> Result<()> {
    println!("cargo {}", arguments.join(" "));
    let status = Command::new(crate::cargo())
        .args(arguments)
        .envs(environment.iter().cloned())
        .current_dir(crate::workspace())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}

/// Runs the model checks of every package that depends on loom.
///
/// In the library they are the tests with `loom` in their path; a test target whose name starts with `loom` is one
/// as a whole. Both are compiled with `--cfg loom`, in a target directory of their own.
fn loom() -> Result<()> {
    let output = Command::new(crate::cargo())
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(crate::workspace())
        .output()
        .context("cannot run cargo metadata")?;
    let packages = with_loom(&output.stdout)?;
    if packages.is_empty() {
        println!("no package depends on loom");
    }
    let target = crate::workspace().join("target/loom").into_os_string();
    let preemptions = std::env::var_os("LOOM_MAX_PREEMPTIONS").unwrap_or_else(|| "3".into());
    let environment = [
        ("RUSTFLAGS", "--cfg loom".into()),
        ("CARGO_TARGET_DIR", target),
        ("LOOM_MAX_PREEMPTIONS", preemptions),
    ];
    for package in packages {
        cargo(&["test", "--release", "--package", &package.name, "--lib", "loom"], &environment)?;
        for test in &package.tests {
            cargo(&["test", "--release", "--package", &package.name, "--test", test], &environment)?;
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct LoomPackage {
    name: String,
    tests: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Named>,
    targets: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    kind: serde_json::Value,
}

/// Finds the packages that depend on loom in cargo's metadata.
fn with_loom(metadata: &[u8]) -> Result<Vec<LoomPackage>> {
    let metadata: Metadata = serde_json::from_slice(metadata).context("cannot read cargo's metadata")?;
    let packages = metadata
        .packages
        .into_iter()
        .filter(|package| package.dependencies.iter().any(|one| one.name == "loom"));
    Ok(packages
        .map(|package| {
            let tests = package.targets.into_iter().filter(|target| {
                target.name.starts_with("loom") && target.kind == serde_json::json!(["test"])
            });
            LoomPackage { name: package.name, tests: tests.map(|target| target.name).collect() }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_depends_on_loom_is_found_with_its_tests() {
        let metadata = br#"{"packages": [
            {"name": "a", "dependencies": [{"name": "loom", "kind": null}],
             "targets": [{"name": "a", "kind": ["lib"]}, {"name": "loom_lock", "kind": ["test"]}, {"name": "x", "kind": ["test"]}]},
            {"name": "b", "dependencies": [{"name": "serde", "kind": "dev"}], "targets": []}]}"#;
        let expected = LoomPackage { name: "a".to_owned(), tests: vec!["loom_lock".to_owned()] };
        assert_eq!(with_loom(metadata).unwrap(), [expected]);
    }
}
