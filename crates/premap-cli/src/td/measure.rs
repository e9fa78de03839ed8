//! `premap td measure`: the MRTD of a firmware, in the order that was asked for or the one that gives a value.

use std::fs::File;
use std::io::{BufWriter, Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use premap_address::PAGE_SIZE;
use premap_tdx::measure::{Search, search, write_events};
use premap_tdx::tdvf::Fault;
use premap_tdx::{Digest, HobError, Image, Measurement, Order, Rules, TdHob, Tdvf, measure};

use super::firmware;
use super::report::Report;
use crate::failure::BadUse;
use crate::size::Size;

/// Flags of `premap td measure`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Exit codes: 0 measured, or --expect fits; 1 it doesn't, or the firmware is bad; 2 bad use."
)]
pub(crate) struct Options {
    /// OVMF image: whole, or the CODE file of a split one
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// VARS file that belongs to a CODE file
    #[arg(long, value_name = "FILE")]
    vars: Option<PathBuf>,
    /// How the VMM adds and measures pages
    #[arg(long, value_enum, default_value_t)]
    order: Ordering,
    /// MRTD to look for, 96 hexadecimal digits: says in which order it comes out
    #[arg(long, value_name = "HEX")]
    expect: Option<Digest>,
    /// Write every ADD and EXTEND to a file, with the value so far every 2 MiB, to compare with another such list
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Guest memory, as 2G: adds the digest of the TD HOB that QEMU's q35 gives the firmware
    #[arg(long, value_name = "SIZE", value_parser = pages, allow_negative_numbers = true)]
    memory: Option<Size>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The order of a VMM's operations, or any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Ordering {
    /// Each page added, then measured: Linux 6.16 and later, QEMU, Cloud Hypervisor, Google Cloud
    Page,
    /// A section's pages all added, then all measured: the KVM patches of 2024, QEMU 8.2 of Ubuntu 24.04
    Region,
    /// The one that gives --expect; without it, page, with region's value beside
    #[default]
    Auto,
}

impl Ordering {
    fn admits(self, rules: Rules) -> bool {
        match self {
            Self::Page => rules.order == Order::Page,
            Self::Region => rules.order == Order::Region,
            Self::Auto => true,
        }
    }
}

/// What an expected value came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A value was measured and none expected.
    Measured,
    /// The expected value came out.
    Fits,
    /// It came out, but in another order than the one asked for.
    FitsOther(Rules),
    /// It did not come out.
    Differs,
}

/// Measures, and prints what came of it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let name = || options.file.display().to_string();
    let image = firmware::read(&options.file, options.vars.as_deref())?;
    let tdvf = Tdvf::parse(&image).with_context(|| match options.vars {
        // The reason that the library gives ends in the remedy; here is how to write it.
        None if is_code(&image) => format!("--vars is missing for {}", name()),
        _ => name(),
    })?;
    let tried = tried(options, &tdvf);
    let (verdict, (rules, measurement)) = decide(options, &tried);
    let hob = options.memory.map(|memory| hob(&tdvf, memory)).transpose()?;
    if let Some(events) = &options.events {
        write_list(events, &tdvf, rules).with_context(|| events.display().to_string())?;
    }
    let report = Report {
        file: name(),
        tdvf: &tdvf,
        rules,
        measurement,
        tried: &tried,
        expected: options.expect,
        verdict,
        hob: options.memory.zip(hob),
    };
    let text = if options.json { report.json()? } else { report.text() };
    stdout().lock().write_all(text.as_bytes()).context("writing to stdout")?;
    let fits = matches!(verdict, Verdict::Measured | Verdict::Fits);
    Ok(if fits { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether a file that can't be measured is the CODE half of a firmware.
fn is_code(image: &Image<'_>) -> bool {
    Tdvf::parse(image).is_err_and(|error| matches!(error.fault, Fault::SplitCode { .. }))
}

/// Measures as often as it takes: in the order asked for, or in every one; until the expected value, if there is one.
fn tried(options: &Options, tdvf: &Tdvf<'_>) -> Vec<(Rules, Measurement)> {
    if let Some(expected) = &options.expect {
        let Search { tried, .. } = search(tdvf.sections(), expected);
        return tried;
    }
    let wanted = Rules::all(tdvf.sections()).filter(|&rules| options.order.admits(rules));
    wanted.map(|rules| (rules, measure(tdvf.sections(), rules))).collect()
}

/// The measurement to report, and what it says of the expected value.
fn decide(options: &Options, tried: &[(Rules, Measurement)]) -> (Verdict, (Rules, Measurement)) {
    let wanted = tried.iter().find(|(rules, _)| options.order.admits(*rules));
    let usual = *wanted.or(tried.first()).expect("there is always an order to try");
    let Some(expected) = options.expect else { return (Verdict::Measured, usual) };
    match tried.iter().find(|(_, measurement)| measurement.mrtd == expected) {
        Some(&(rules, measurement)) if options.order.admits(rules) => (Verdict::Fits, (rules, measurement)),
        Some(&(rules, _)) => (Verdict::FitsOther(rules), usual),
        None => (Verdict::Differs, usual),
    }
}

pub(super) fn hob(tdvf: &Tdvf<'_>, memory: Size) -> anyhow::Result<TdHob> {
    TdHob::q35(tdvf, memory.0).map_err(|error| match error {
        HobError::OutsideRam { .. } | HobError::RamTooLarge { .. } | HobError::RamSize { .. } => {
            BadUse(format!("--memory {}: {error}; give a size such as 2G", memory.flag())).into()
        }
        error => anyhow::Error::new(error).context("TD HOB"),
    })
}

fn write_list(file: &Path, tdvf: &Tdvf<'_>, rules: Rules) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(file)?);
    write_events(tdvf.sections(), rules, &mut out)?;
    out.flush()
}

pub(super) fn pages(text: &str) -> Result<Size, String> {
    match text.parse()? {
        Size(0) => Err("no memory at all; give a size such as 2G".to_owned()),
        Size(bytes) if !bytes.is_multiple_of(PAGE_SIZE) => {
            Err("not a multiple of the page size, 4 KiB; give a size such as 2G".to_owned())
        }
        size => Ok(size),
    }
}
