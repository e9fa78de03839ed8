//! `premap td`: TDX guests.

mod firmware;
mod measure;
mod report;
mod run;

use std::process::ExitCode;

use clap::Subcommand;

/// What to do about a TD.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Td {
    /// Say what a TDX guest built from a firmware measures to (its MRTD), or why a value differs
    Measure(measure::Options),
    /// Launch a TD from a firmware on the software KVM, with its memory mapped ahead, and have its guest accept it
    Run(run::Options),
}

/// Does it.
pub(crate) fn run(td: &Td) -> anyhow::Result<ExitCode> {
    match td {
        Td::Measure(options) => measure::run(options),
        Td::Run(options) => run::run(options),
    }
}
