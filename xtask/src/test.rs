//! `cargo xtask test`: every check of the project, in order, up to the first that fails.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::lab::kernel::Line;
use crate::{packages, suite};

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
        Step::Clippy => clippy(),
        Step::Docs => {
            let strict = [("RUSTDOCFLAGS", "-D warnings".into())];
            cargo(&["doc", "--workspace", "--features", FEATURES, "--no-deps"], &strict)
        }
        Step::Host => cargo(&["test", "--workspace", "--features", FEATURES], &[]),
        Step::Loom => loom(),
        Step::Lab => suite::run(&options.kernel),
    }
}

/// Optional features that are checked with the defaults. Not premap-tdx's other hash libraries: they build C and assembly
/// for minutes, with tools that a bare machine lacks.
const FEATURES: &str = "premap/vm-memory,premap/td";

fn clippy() -> Result<()> {
    cargo(&["clippy", "--workspace", "--all-targets", "--features", FEATURES, "--", "-D", "warnings"], &[])?;
    for package in packages::all()?.iter().filter(|package| package.can_do_without_std()) {
        cargo(&["clippy", "--package", &package.name, "--no-default-features", "--", "-D", "warnings"], &[])?;
    }
    Ok(())
}

/// Runs the model checks, compiled with `--cfg loom` in a target directory of their own.
fn loom() -> Result<()> {
    let target = crate::workspace().join("target/loom").into_os_string();
    let preemptions = std::env::var_os("LOOM_MAX_PREEMPTIONS").unwrap_or_else(|| "3".into());
    let environment = [
        ("RUSTFLAGS", "--cfg loom".into()),
        ("CARGO_TARGET_DIR", target),
        ("LOOM_MAX_PREEMPTIONS", preemptions),
    ];
    for package in packages::all()? {
        let mut listed = Vec::new();
        for part in package.loom_tests() {
            let mut arguments = vec!["test", "--release", "--package", &package.name];
            arguments.extend(part);
            cargo(&arguments, &environment)?;
            arguments.extend(["--", "--list"]);
            listed.extend(command(&arguments, &environment).output().context("cannot run cargo")?.stdout);
        }
        // A model check that is named otherwise would silently never run.
        if !package.loom_tests().is_empty() && !String::from_utf8_lossy(&listed).contains(": test") {
            bail!("{} depends on loom and has no test with loom in its path", package.name);
        }
    }
    Ok(())
}

fn cargo(arguments: &[&str], environment: &[(&str, OsString)]) -> Result<()> {
    println!("cargo {}", arguments.join(" "));
    let status = command(arguments, environment).status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", arguments.join(" "));
    }
    Ok(())
}

fn command(arguments: &[&str], environment: &[(&str, OsString)]) -> Command {
    let mut command = Command::new(crate::cargo());
    command.args(arguments).envs(environment.iter().cloned()).current_dir(crate::workspace());
    command
}
