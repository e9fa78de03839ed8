//! The JSON of `premap run`: an array with an object for each strategy. Sizes are in bytes, times in nanoseconds.
//!
//! `repeat` is the number of rounds, `samples` has one object of each. The object's own times and counts are medians over
//! them, each for itself; its accounts, reasons and mapped pages are those of the round that mapped least. A stage's account
//! adds up: `asked` = `mapped` + `skipped` + `failed` + `abandoned`. `bytes` is `mapped` by its older name.

use premap::Stage;
use premap_address::PAGE_SIZE;
use serde::Serialize;

use super::account::Account;
use crate::first_touch::Outcome;
use crate::linux_guest;
use crate::run::Common;
use crate::series::{Figure, Series};
use crate::strategy::Strategy;

#[derive(Serialize)]
struct Row<'a> {
    backend: &'a str,
    kernel: &'a str,
    strategy: Strategy,
    backing: &'a str,
    memory_bytes: u64,
    pages: u64,
    vcpus: u32,
    repeat: u32,
    #[serde(flatten)]
    sample: Sample,
    /// Of the Linux guest: from the first entry into the guest to its marker.
    #[serde(skip_serializing_if = "Option::is_none")]
    boot_ns: Option<u64>,
    samples: Vec<Sample>,
}

#[derive(Serialize)]
struct Sample {
    host: Host,
    second: Second,
    guest: Guest,
    mapped: Mapped,
    total_ns: u64,
}

#[derive(Serialize)]
struct Host {
    ns: u64,
    bytes: u64,
    #[serde(flatten)]
    account: Account,
    calls: u64,
    /// Why not all was mapped.
    reason: Option<String>,
}

#[derive(Serialize)]
struct Second {
    ns: u64,
    bytes: u64,
    #[serde(flatten)]
    account: Account,
    calls: u64,
    /// Whether this KVM can do it at all, also where the strategy did not ask for it.
    supported: bool,
    /// Why it can't, or why not all was mapped.
    reason: Option<String>,
}

#[derive(Serialize)]
struct Guest {
    ns: u64,
    faults: u64,
    exits: u64,
}

#[derive(Serialize)]
struct Mapped {
    pages_4k: u64,
    pages_2m: u64,
    pages_1g: u64,
}

/// The array, with a newline at its end.
pub(crate) fn array(common: &Common, all: &[Series]) -> serde_json::Result<String> {
    let rows: Vec<_> = all.iter().map(|series| row(common, series)).collect();
    let mut text = serde_json::to_string_pretty(&rows)?;
    text.push('\n');
    Ok(text)
}

fn row<'a>(common: &'a Common, series: &Series) -> Row<'a> {
    let is_linux = common.guest == linux_guest::Guest::Linux;
    Row {
        backend: common.backend,
        kernel: &common.kernel,
        strategy: series.strategy(),
        backing: common.setting.backing.name(),
        memory_bytes: common.setting.bytes,
        pages: common.setting.bytes / PAGE_SIZE,
        vcpus: common.setting.vcpus,
        repeat: common.rounds,
        sample: sample(series.least(), |figure| series.median(figure)),
        boot_ns: is_linux.then(|| series.median(|outcome| outcome.guest_ns)),
        samples: series.samples().map(|outcome| sample(outcome, |figure| figure(outcome))).collect(),
    }
}

/// What became of memory in `outcome`, with times and counts as `value` has them.
fn sample(outcome: &Outcome, value: impl Fn(Figure) -> u64) -> Sample {
    let (report, host, second) = (&outcome.report, &outcome.report.host, &outcome.report.second);
    let short = |stage| outcome.shortfall(stage).map(|reason| reason.to_string());
    Sample {
        host: Host {
            ns: value(|outcome| outcome.report.host.ns),
            bytes: host.mapped,
            account: Account::of(report.asked, host),
            calls: host.calls,
            reason: short(Stage::Host),
        },
        second: Second {
            ns: value(|outcome| outcome.report.second.ns),
            bytes: second.mapped,
            account: Account::of(report.asked, second),
            calls: second.calls,
            supported: outcome.unsupported.is_none(),
            reason: outcome.unsupported.clone().or_else(|| short(Stage::Second)),
        },
        guest: Guest {
            ns: value(|outcome| outcome.guest_ns),
            faults: value(|outcome| outcome.faults),
            exits: value(|outcome| outcome.exits),
        },
        mapped: Mapped {
            pages_4k: outcome.mapped.pages_4k,
            pages_2m: outcome.mapped.pages_2m,
            pages_1g: outcome.mapped.pages_1g,
        },
        total_ns: value(Outcome::total_ns),
    }
}
