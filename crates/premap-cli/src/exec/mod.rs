//! `premap exec`: any dynamically linked VMM, as it is, on memory that is mapped ahead.
//!
//! The command looks at the program, sets two environment variables and becomes the program: exit code, signals,
//! descriptors and process id are the VMM's own. The work is done inside it by the preloaded library.

mod flags;
mod library;
mod program;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::Context;
use premap_exec_settings::{self as settings, Report, Settings};

pub(crate) use flags::Exec;

/// The dynamic linker's variable.
const LD_PRELOAD: &str = "LD_PRELOAD";

/// Becomes the VMM. Gives back control only where that fails.
pub(crate) fn run(options: &Exec) -> anyhow::Result<ExitCode> {
    let (name, arguments) = options.command();
    let program = program::find(name)?;
    program::check(&program)?;
    let library = library::find()?;
    let settings = prepared(options.settings())?;

    let mut preload = OsString::from(library);
    if let Some(others) = std::env::var_os(LD_PRELOAD).filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    let encoded = settings.encode().context("--report: the path is not UTF-8")?;
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments).env(LD_PRELOAD, preload).env(settings::VARIABLE, encoded);
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// Empties the report's file, and names it in a way that holds wherever the VMM goes.
fn prepared(mut settings: Settings) -> anyhow::Result<Settings> {
    if let Some(Report::File(path)) = &mut settings.report {
        let told = path.clone();
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&*path)
            .and_then(|_| path.canonicalize())
            .map(|whole| *path = whole)
            .with_context(|| format!("--report {}", told.display()))?;
    }
    Ok(settings)
}
