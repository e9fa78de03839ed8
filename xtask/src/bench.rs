//! `cargo xtask bench`: the benchmarks by name.
//!
//! Each is a bench target of the crate that it measures. With `--json` it prints one array of objects with `bench`,
//! `subject` (premap, a peer or a floor), `threads`, `value`, `unit` and `spread`, and nothing else on stdout.

use std::process::{Command, ExitCode};

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// The second-stage page tables, against other crates and floors
    Mmu,
    /// Pre-faulting on the software KVM
    Softkvm,
    /// The engine's host stage, against a bare loop of its system call
    Engine,
    /// Measuring a TD, against the hash alone
    Td,
}

impl Name {
    /// The package and its bench target.
    const fn target(self) -> (&'static str, &'static str) {
        match self {
            Self::Mmu => ("premap-mmu", "mmu"),
            Self::Softkvm => ("premap-softkvm", "prefault"),
            Self::Engine => ("premap", "engine"),
            Self::Td => ("premap-tdx", "td"),
        }
    }
}

/// Flags of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which benchmark
    #[arg(value_enum)]
    name: Name,
    /// What the benchmark is told: `--json`, and its own flags
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

/// Runs the benchmark.
pub(crate) fn run(options: &Options) -> ExitCode {
    let (package, bench) = options.name.target();
    let status = Command::new(crate::cargo())
        .args(["bench", "--quiet", "--package", package, "--bench", bench, "--"])
        .args(&options.arguments)
        .current_dir(crate::workspace())
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: cannot run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}
