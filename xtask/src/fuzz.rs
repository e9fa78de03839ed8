//! `cargo xtask fuzz`: the fuzz targets by name, with libFuzzer on the stable toolchain.
//!
//! Each lies in the `fuzz` folder of the crate that it fuzzes, a workspace of its own, since it builds with coverage.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

/// A fuzz target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Sequences of operations on a second-stage page table
    Operations,
    /// Sequences of SEAMCALLs
    Seamcalls,
    /// TDVF firmware, parsed
    Tdvf,
    /// Working sets, parsed
    WorkingSet,
}

impl Target {
    const fn name(self) -> &'static str {
        match self {
            Self::Operations => "operations",
            Self::Seamcalls => "seamcalls",
            Self::Tdvf => "tdvf",
            Self::WorkingSet => "working_set",
        }
    }

    const fn package(self) -> &'static str {
        match self {
            Self::Operations => "premap-mmu",
            Self::Seamcalls => "premap-tdx-module",
            Self::Tdvf => "premap-tdx",
            Self::WorkingSet => "premap",
        }
    }

    /// The longest input, in bytes: beyond it inputs only get slower.
    const fn longest(self) -> u32 {
        match self {
            Self::Operations | Self::WorkingSet => 4096,
            Self::Seamcalls => 2048,
            Self::Tdvf => 16384,
        }
    }
}

/// Flags of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What is fuzzed
    #[arg(value_enum)]
    target: Target,
    /// For how long
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    seconds: u32,
    /// Flags for libFuzzer, as `-jobs=2`
    #[arg(last = true, value_name = "FLAGS")]
    flags: Vec<OsString>,
}

/// Fuzzes. A finding is a failure, and lies in the folder's `artifacts`.
pub(crate) fn run(options: &Options) -> ExitCode {
    match fuzz(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fuzz(options: &Options) -> Result<()> {
    let target = options.target;
    let folder = crate::workspace().join("crates").join(target.package()).join("fuzz");
    let host = host()?;
    let built = crate::workspace().join("target/fuzz");
    // With a target named, the flags are for the program alone and not for build scripts.
    let status = Command::new(crate::cargo())
        .args(["build", "--release", "--bin", target.name(), "--target", &host])
        .env("RUSTFLAGS", coverage())
        .env("CARGO_TARGET_DIR", &built)
        .current_dir(&folder)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("{} does not build; libFuzzer needs a C++ compiler: `apt-get install g++`", target.name());
    }
    let corpus = Path::new("corpus").join(target.name());
    for made in [&corpus, Path::new("artifacts")] {
        fs::create_dir_all(folder.join(made))
            .with_context(|| format!("cannot make {} in {}", made.display(), folder.display()))?;
    }
    let program = built.join(host).join("release").join(target.name());
    let seeds = folder.join("seeds").is_dir().then_some(Path::new("seeds"));
    let status = Command::new(&program)
        .arg(&corpus)
        .args(seeds)
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-max_len={}", target.longest()))
        .args(["-timeout=20", "-rss_limit_mb=1024", "-artifact_prefix=artifacts/"])
        .args(&options.flags)
        .current_dir(&folder)
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !status.success() {
        bail!(
            "{} ended with {status}; what it found is in {}",
            target.name(),
            folder.join("artifacts").display()
        );
    }
    Ok(())
}

/// What makes rustc count edges and comparisons where libFuzzer finds them.
fn coverage() -> String {
    let passes = ["level=4", "inline-8bit-counters", "pc-table", "trace-compares"]
        .map(|option| format!("-Cllvm-args=-sanitizer-coverage-{option}"));
    let first = ["--cfg fuzzing", "-Ccodegen-units=1", "-Cpasses=sancov-module"].map(str::to_owned);
    first.into_iter().chain(passes).collect::<Vec<_>>().join(" ")
}

/// The triple of this machine's toolchain.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV tells no host")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_target_of_every_crate_has_a_name_here() {
        let crates = fs::read_dir(crate::workspace().join("crates")).unwrap();
        let folders = crates.map(|entry| entry.unwrap().path().join("fuzz/fuzz_targets"));
        let mut there: Vec<_> = folders
            .filter_map(|folder| fs::read_dir(folder).ok())
            .flat_map(|files| files.map(|file| file.unwrap().path()))
            .map(|file| file.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        let mut known: Vec<_> = Target::value_variants().iter().map(|target| target.name()).collect();
        there.sort();
        known.sort();
        assert_eq!(known, there);
    }
}
