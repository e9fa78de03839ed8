//! `premap td run`: launches a TD from a firmware on the software KVM, and has its guest accept all memory.

mod outcome;
mod report;

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use premap::Stage;
use premap_address::GpaRange;
use premap_softkvm::Profile;
use premap_tdx::hob::Ram;
use premap_tdx::{Order, Tdvf, measure};

use outcome::Outcome;

use super::firmware;
use super::measure::{hob, pages};
use crate::failure::tell;
use crate::host_memory;
use crate::options::rounds;
use crate::output::account::shortfall;
use crate::series::Series;
use crate::size::Size;

/// Flags of `premap td run`.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Exit codes: 0 the TD ran, 1 it failed, 2 bad use.")]
pub(crate) struct Options {
    /// OVMF image: whole, or the CODE file of a split one
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// VARS file that belongs to a CODE file
    #[arg(long, value_name = "FILE")]
    vars: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = pages, allow_negative_numbers = true)]
    memory: Size,
    /// How many vCPUs the TD has; all of them map
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,
    /// Which KVM, one or more of them to compare: proposal, combined, 6.16, 6.19, 7.2
    #[arg(long, value_name = "PROFILE", default_value = "proposal", value_delimiter = ',', value_parser = with_tdx)]
    profile: Vec<Profile>,
    /// Leave memory to the guest's demand after the launch
    #[arg(long)]
    no_premap: bool,
    /// How often each profile is run, once a round: figures are medians, with the lowest and the highest
    #[arg(long, value_name = "N", default_value = "1", value_parser = rounds, allow_negative_numbers = true)]
    repeat: u32,
    /// Print JSON: an object, or with several profiles an array of them, with medians, accounts and all samples
    #[arg(long)]
    json: bool,
}

/// Launches, runs, and prints what it came to.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let name = || options.file.display().to_string();
    let image = firmware::read(&options.file, options.vars.as_deref())?;
    let tdvf = Tdvf::parse(&image).with_context(name)?;
    let hob = hob(&tdvf, options.memory)?;
    host_memory::check_td(options.memory)?;
    // The HOB was made, so RAM of this size can be.
    let ram = Ram::q35(options.memory.0).context("RAM")?;
    let memory = slots(&ram, &tdvf);
    let expected = measure(tdvf.sections(), Order::Page.into()).mrtd;
    let mut all: Vec<Series<Outcome>> = Vec::new();
    for profile in (0..options.repeat).flat_map(|_| &options.profile) {
        let outcome = Outcome::of(*profile, options, &tdvf, &hob, &memory, &ram)
            .with_context(|| format!("{}, as {profile}", name()))?;
        ensure!(
            outcome.mrtd == expected,
            "{}, as {profile}: the TD measures {}, and its firmware {expected}",
            name(),
            outcome.mrtd
        );
        match all.iter_mut().find(|series| series.first().profile == *profile) {
            Some(series) => series.push(outcome),
            None => all.push(Series::new(outcome)),
        }
    }
    let text = if options.json { report::json(&all)? } else { report::text(options, &all) };
    stdout().lock().write_all(text.as_bytes()).context("writing to stdout")?;
    Ok(told_failures(&all))
}

/// Tells of memory that the KVM refused to map. The guest has it by its own exits, if at all.
fn told_failures(all: &[Series<Outcome>]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for outcome in all.iter().flat_map(Series::samples) {
        for (phase, report) in outcome.mapped().into_iter().filter(|(_, report)| report.second.failed > 0) {
            let why = shortfall(report, Stage::Second).map(|reason| reason.to_string()).unwrap_or_default();
            tell(format_args!("{}, {phase}: {} failed: {why}", outcome.profile, Size(report.second.failed)));
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// The TD's memory: RAM, and what the firmware has outside of it, joined where sections touch.
fn slots(ram: &Ram, tdvf: &Tdvf<'_>) -> Vec<GpaRange> {
    let in_ram = |section: &GpaRange| ram.ranges().iter().any(|range| range.intersection(*section).is_some());
    let mut outside: Vec<GpaRange> =
        tdvf.sections().iter().map(premap_tdx::Section::memory).filter(|section| !in_ram(section)).collect();
    outside.sort_by_key(|range| range.start());
    let mut slots = ram.ranges().to_vec();
    let mut rest = outside.into_iter();
    let Some(mut slot) = rest.next() else { return slots };
    for range in rest {
        match slot.join(range) {
            Some(joined) => slot = joined,
            None => slots.push(std::mem::replace(&mut slot, range)),
        }
    }
    slots.push(slot);
    slots
}

fn with_tdx(text: &str) -> Result<Profile, String> {
    let profiles = [Profile::PROPOSAL, Profile::COMBINED, Profile::V6_16, Profile::V6_19, Profile::V7_2];
    let names = || profiles.map(Profile::name).join(", ");
    let known = profiles.into_iter().find(|profile| profile.name() == text);
    known.ok_or_else(|| format!("no such profile with TDX; give one or more of {}", names()))
}
