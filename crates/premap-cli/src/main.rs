//! The premap command: run, record, exec, doctor, td.

mod backend;
mod doctor;
mod exec;
mod failure;
mod files;
mod first_touch;
mod host_memory;
mod linux_guest;
mod mapping;
mod options;
mod output;
mod record;
mod run;
mod series;
mod size;
mod strategy;
mod td;
mod working_set;

use std::process::ExitCode;

use clap::Parser;
use options::{Command, Options};

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => return failure::report_usage(&error),
    };
    let done = match &options.command {
        Command::Run(options) => run::run(options),
        Command::Record(options) => record::run(options),
        Command::Exec(options) => exec::run(options),
        Command::Doctor(options) => doctor::run(*options),
        Command::Td(options) => td::run(options),
    };
    done.unwrap_or_else(|error| failure::report(&error))
}
