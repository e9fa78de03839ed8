//! `cargo xtask conformance`: random scripts on the software KVM and on a real kernel, compared in one boot of the lab.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::lab;
use crate::lab::kernel::Line;

/// Flags of `cargo xtask conformance`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernel series such as 6.12, or `latest`, or `private`: one with software-protected VMs, built from source when first
    /// asked for
    #[arg(long, value_name = "SERIES", default_value = "6.12")]
    kernel: Line,
    /// How many scenarios
    #[arg(long, default_value_t = 500)]
    cases: u64,
    /// What they are made from; unless given, the time, and it is printed
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds that all of it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
}

/// Runs the comparison. Its verdict becomes ours.
pub(crate) fn run(options: Options) -> ExitCode {
    let seed = options.seed.unwrap_or_else(fresh_seed).to_string();
    let cases = options.cases.to_string();
    let command = ["conformance", "--cases", &cases, "--seed", &seed].map(str::to_owned).to_vec();
    lab::run_command(lab::Options::of_program(options.kernel, command, options.timeout))
}

/// A seed that no run before had.
pub(crate) fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
