//! `cargo xtask bench`: the benchmarks by name.
//!
//! Each is a bench target of the crate that it measures. With `--json` it prints one array of objects with `bench`,
//! `subject` (premap, a peer or a floor), `threads`, `value`, `unit` and `spread`, and nothing else on stdout.

use std::process::{Command, ExitCode, Stdio};

/// A benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// The second-stage page tables, against other crates and floors
    Mmu,
    /// Pre-faulting on the software KVM
    Softkvm,
    /// The engine's host stage, against a bare loop of its system call
    Engine,
    /// Measuring a TD, against the hash alone, and reserving its memory by one vCPU and by two
    Td,
}

impl Name {
    /// Packages and their bench targets.
    const fn targets(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Mmu => &[("premap-mmu", "mmu")],
            Self::Softkvm => &[("premap-softkvm", "prefault")],
            Self::Engine => &[("premap", "engine")],
            Self::Td => &[("premap-tdx", "td"), ("premap-guest", "reserve")],
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
    match bench(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> Result<(), String> {
    let json = options.arguments.iter().any(|argument| argument == "--json");
    let mut lines: Vec<serde_json::Value> = Vec::new();
    for (package, bench) in options.name.targets() {
        let mut command = Command::new(crate::cargo());
        command
            .args(["bench", "--quiet", "--package", package, "--bench", bench, "--"])
            .args(&options.arguments)
            .current_dir(crate::workspace());
        let cannot = |error| format!("cannot run cargo: {error}");
        let failed = || format!("the bench {bench} of {package} failed");
        if json {
            let output = command.stderr(Stdio::inherit()).output().map_err(cannot)?;
            let array: Option<Vec<serde_json::Value>> =
                output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten();
            lines.extend(array.ok_or_else(failed)?);
        } else if !command.status().map_err(cannot)?.success() {
            return Err(failed());
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(lines));
    }
    Ok(())
}
