//! `cargo xtask lab`: one command in one boot.

use std::io::{stderr, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use super::boot::{Boot, Broken, Job};
use super::initramfs::GuestFile;
use super::kernel::Line;
use super::machine::Machine;
use super::{Lab, binaries, note};

/// The exit code when the guest did not come up or the command did not end in time, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// The exit code when the lab itself failed.
const FAILED: u8 = 125;

/// Flags of `cargo xtask lab`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kernel series such as 6.12, or `latest`, or `private`: one with software-protected VMs, built from source when first
    /// asked for
    #[arg(long, value_name = "SERIES", default_value = "6.12")]
    kernel: Line,
    #[command(flatten)]
    machine: Machine,
    /// Seconds that the command may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Don't build premap for a COMMAND that doesn't need it
    #[arg(long)]
    no_premap: bool,
    /// What to run: premap, conformance, example-vmm, a busybox applet, or the path of a static program on this machine
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Options {
    /// Runs `command`, a program of the workspace, on the usual machine.
    pub(crate) fn of_program(kernel: Line, command: Vec<String>, timeout: u64) -> Self {
        Self { kernel, machine: Machine::default(), timeout, no_premap: true, command }
    }
}

/// Runs the command in the lab. Its output and exit code become ours.
pub(crate) fn run_command(options: Options) -> ExitCode {
    match boot_and_run(options) {
        // What a process can end with fits a byte.
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(FAILED)),
        Err(error) => {
            note!("error: {error}");
            ExitCode::from(if matches!(error, Broken::TimedOut { .. }) { TIMED_OUT } else { FAILED })
        }
    }
}

fn boot_and_run(options: Options) -> Result<i32, Broken> {
    let mut argv = options.command;
    let mut files = Vec::new();
    let program = argv.first_mut().context("no command was given")?;
    if program.contains('/') && Path::new(program).is_file() {
        let file = GuestFile::from_host(Path::new(program))?;
        *program = format!("/lab/{}", file.name);
        files.push(file);
    }
    let lab = Lab::prepare(std::slice::from_ref(&options.kernel)).context("the lab cannot be prepared")?;
    let mut programs = vec![argv[0].as_str()];
    if !options.no_premap && programs != ["premap"] {
        programs.push("premap");
    }
    for program in programs {
        files.extend(binaries::program(&lab.directory, program)?);
    }
    let kernel = lab.kernels.first().context("no kernel was prepared")?;
    let mut boot = Boot::start(&lab, kernel, &options.machine, &files)?;
    let job = Job { argv, environment: environment(), timeout: Duration::from_secs(options.timeout) };
    boot.run(&job, &mut stdout().lock(), &mut stderr().lock())
}

/// Returns the host's settings that a guest command gets too. Not those of a guest to boot, since the lab has its own.
pub(crate) fn environment() -> Vec<(String, String)> {
    let ours = |name: &str| name.starts_with("PREMAP_") && !name.starts_with("PREMAP_GUEST_");
    std::env::vars().filter(|(name, _)| ours(name) || name == "RUST_BACKTRACE").collect()
}
