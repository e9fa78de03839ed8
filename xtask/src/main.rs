//! The one entry for developers: test, lab, exec-check, conformance, bench, fuzz.

mod acceptance;
mod bench;
mod conformance;
mod exec_check;
mod fuzz;
mod lab;
mod packages;
mod suite;
mod test;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer's tasks of premap", max_term_width = 100)]
enum Task {
    /// Run a command in a virtual machine whose kernel has KVM with nested paging
    Lab(lab::Options),
    /// Boot Linux in an unchanged QEMU, with and without premap exec, and compare
    ExecCheck(exec_check::Options),
    /// Compare the software KVM with a real kernel, scenario by scenario
    Conformance(conformance::Options),
    /// Run a benchmark
    Bench(bench::Options),
    /// Fuzz a parser or sequences of operations
    Fuzz(fuzz::Options),
    /// Run every check: formatting, lints, docs, tests on this machine and in the lab
    Test(test::Options),
}

fn main() -> ExitCode {
    match Task::parse() {
        Task::Lab(options) => lab::run_command(options),
        Task::ExecCheck(options) => exec_check::run_command(&options),
        Task::Conformance(options) => conformance::run(options),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Test(options) => test::run(&options),
    }
}

/// Returns the root of the workspace.
fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Returns the cargo that runs this program.
fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
