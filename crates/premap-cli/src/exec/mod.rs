//! `premap exec`: any dynamically linked VMM, as it is, on memory that is mapped ahead.
//!
//! The command looks at the program, sets two environment variables and becomes the program: exit code, signals,
//! descriptors and process id are the VMM's own. The work is done inside it by the preloaded library.

mod flags;
mod library;
mod program;

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;
use premap_exec_settings::{self as settings, REPORT_VERSION, Report, Settings};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

pub(crate) use flags::Exec;

/// The dynamic linker's variable.
const LD_PRELOAD: &str = "LD_PRELOAD";

/// Becomes the VMM. Gives back control only where that fails.
pub(crate) fn run(options: &Exec) -> anyhow::Result<ExitCode> {
    let (name, arguments) = options.command();
    let program = program::find(name)?;
    program::check(&program)?;
    let library = library::find()?;
    let settings = prepared(options.settings(), name)?;

    let mut preload = OsString::from(library);
    if let Some(others) = std::env::var_os(LD_PRELOAD).filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    let encoded = settings.encode().context("cannot write the settings")?;
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments).env(LD_PRELOAD, preload).env(settings::VARIABLE, encoded);
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// Begins the report, and names its file in a way that holds wherever the VMM goes. Whatever becomes of the VMM, the
/// report has its first line: one that stays alone says that nothing was mapped.
fn prepared(mut settings: Settings, vmm: &OsStr) -> anyhow::Result<Settings> {
    let process = std::process::id();
    settings.process = Some(process);
    let mut line = serde_json::json!({
        "version": REPORT_VERSION,
        "vmm": Path::new(vmm).file_name().unwrap_or_default().to_string_lossy(),
        "pid": process,
        "event": "started",
    })
    .to_string();
    line.push('\n');
    match &mut settings.report {
        None => {}
        Some(Report::File(path)) => {
            let told = path.clone();
            let mut options = OpenOptions::new();
            options
                .write(true)
                .create(true)
                .truncate(true)
                .open(&*path)
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .and_then(|()| path.canonicalize())
                .map(|whole| *path = whole)
                .with_context(|| format!("--report {}", told.display()))?;
        }
        Some(Report::Descriptor(number)) => {
            inherited(*number)
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .with_context(|| format!("--report fd:{number}"))?;
        }
    }
    Ok(settings)
}

/// A copy of a descriptor that this process has by number only.
fn inherited(number: RawFd) -> std::io::Result<File> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(own, number, PidfdGetfdFlags::empty())?.into())
}
