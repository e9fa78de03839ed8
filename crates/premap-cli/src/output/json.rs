//! The JSON of `premap run`: an array with an object for each strategy. Sizes are in bytes, times in nanoseconds.

use premap::Stage;
use premap_address::PAGE_SIZE;
use serde::Serialize;

use crate::first_touch::Outcome;
use crate::linux_guest;
use crate::run::Common;
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
    host: Host,
    second: Second,
    guest: Guest,
    mapped: Mapped,
    total_ns: u64,
    /// Of the Linux guest: from the first entry into the guest to its marker.
    #[serde(skip_serializing_if = "Option::is_none")]
    boot_ns: Option<u64>,
}

#[derive(Serialize)]
struct Host {
    ns: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Second {
    ns: u64,
    bytes: u64,
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
pub(crate) fn array(common: &Common, outcomes: &[Outcome]) -> serde_json::Result<String> {
    let rows: Vec<_> = outcomes.iter().map(|outcome| row(common, outcome)).collect();
    let mut text = serde_json::to_string_pretty(&rows)?;
    text.push('\n');
    Ok(text)
}

fn row<'a>(common: &'a Common, outcome: &Outcome) -> Row<'a> {
    let (host, second) = (&outcome.report.host, &outcome.report.second);
    let short = || outcome.shortfall(Stage::Second).map(|reason| reason.to_string());
    Row {
        backend: common.backend,
        kernel: &common.kernel,
        strategy: outcome.strategy,
        backing: common.setting.backing.name(),
        memory_bytes: common.setting.bytes,
        pages: common.setting.bytes / PAGE_SIZE,
        vcpus: common.setting.vcpus,
        host: Host { ns: host.ns, bytes: host.mapped },
        second: Second {
            ns: second.ns,
            bytes: second.mapped,
            calls: second.calls,
            supported: outcome.unsupported.is_none(),
            reason: outcome.unsupported.clone().or_else(short),
        },
        guest: Guest { ns: outcome.guest_ns, faults: outcome.faults, exits: outcome.exits },
        mapped: Mapped {
            pages_4k: outcome.mapped.pages_4k,
            pages_2m: outcome.mapped.pages_2m,
            pages_1g: outcome.mapped.pages_1g,
        },
        total_ns: outcome.total_ns(),
        boot_ns: (common.guest == linux_guest::Guest::Linux).then_some(outcome.guest_ns),
    }
}
