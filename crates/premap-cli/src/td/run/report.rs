//! What `premap td run` prints: the phases of each profile side by side, or JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::{CellAlignment, Table};
use premap::td::Phase;
use premap::{Report, Stage};
use serde::Serialize;

use super::Options;
use super::outcome::Outcome;
use crate::output::account::{self, Account, shortfall};
use crate::output::{STYLE, wrap};
use crate::size::{Size, counted, thousands, time};

#[derive(Serialize)]
struct Json<'a> {
    profile: &'static str,
    mrtd: String,
    phases: Vec<JsonPhase>,
    /// What became of the memory that the phases of the same names were to map, in bytes.
    reserve: JsonAccount,
    map_rest: JsonAccount,
    seamcalls: &'a BTreeMap<&'static str, u64>,
    accept: JsonAccept,
    demand_exits: u64,
}

#[derive(Serialize)]
struct JsonAccount {
    #[serde(flatten)]
    account: Account,
    /// Why not all was mapped.
    reason: Option<String>,
}

#[derive(Serialize)]
struct JsonPhase {
    name: &'static str,
    ns: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct JsonAccept {
    pages: u64,
    exits: u64,
    ns: u64,
}

const ALL: [Phase; 5] = [Phase::InitVcpus, Phase::Reserve, Phase::Add, Phase::Finalize, Phase::MapRest];

/// An object, or an array of them.
pub(super) fn json(outcomes: &[Outcome]) -> serde_json::Result<String> {
    let objects: Vec<Json<'_>> = outcomes.iter().map(object).collect();
    let text = match objects.as_slice() {
        [one] => serde_json::to_string_pretty(one)?,
        all => serde_json::to_string_pretty(all)?,
    };
    Ok(text + "\n")
}

fn object(outcome: &Outcome) -> Json<'_> {
    let phases = outcome.launch.phases.iter().map(|phase| JsonPhase {
        name: phase.phase.name(),
        ns: phase.ns,
        bytes: phase.bytes,
    });
    Json {
        profile: outcome.profile.name(),
        mrtd: outcome.mrtd.to_string(),
        phases: phases.collect(),
        reserve: json_account(&outcome.launch.reserve),
        map_rest: json_account(&outcome.launch.rest),
        seamcalls: &outcome.seamcalls,
        accept: JsonAccept {
            pages: outcome.acceptance.pages,
            exits: outcome.acceptance.exits,
            ns: nanoseconds(outcome),
        },
        demand_exits: outcome.demand_exits(),
    }
}

/// A launch has no host stage: private memory is the module's.
fn account(report: &Report) -> Account {
    Account::of(report.asked, &report.second)
}

fn json_account(report: &Report) -> JsonAccount {
    let reason = shortfall(report, Stage::Second).map(|reason| reason.to_string());
    JsonAccount { account: account(report), reason }
}

fn accounts(outcomes: &[Outcome]) -> Table {
    let rows = outcomes.iter().flat_map(|outcome| {
        let row = |(phase, report): (Phase, _)| (outcome.profile.to_string(), phase.name(), account(report));
        outcome.mapped().map(row)
    });
    account::table("profile", rows)
}

fn nanoseconds(outcome: &Outcome) -> u64 {
    u64::try_from(outcome.acceptance.elapsed.as_nanos()).unwrap_or(u64::MAX)
}

/// The text.
pub(super) fn text(options: &Options, outcomes: &[Outcome]) -> String {
    let vcpus = counted(options.vcpus.into(), "vCPU");
    let headline = format!(
        "A TD with {} of memory and {vcpus}, launched from {} on the software KVM and a modelled TDX module. Times are \
         this machine's, of one run each, not hardware's; calls and exits are exact.",
        options.memory,
        options.file.display(),
    );
    let mut text = format!("{}\n\n{}\n\n", wrap(&headline, 0), phases(outcomes));
    for phase in ALL {
        let _ = writeln!(text, "{:12} {}", phase.name(), wrap(meaning(phase), 13));
    }
    let _ = write!(
        text,
        "{:12} {}\n\n",
        "accept",
        wrap("the guest's ACCEPT of all its memory, on all vCPUs", 13)
    );
    let _ = write!(text, "{}\n\n{}\n\n", seamcalls(outcomes), accounts(outcomes));
    for outcome in outcomes {
        let exits = counted(outcome.acceptance.exits, "exit");
        let demand = thousands(outcome.demand_exits());
        let sentence = format!("{}: {exits} for the guest's ACCEPTs; on demand, {demand}.", outcome.profile);
        let _ = writeln!(text, "{}", wrap(&sentence, 0));
    }
    for outcome in outcomes {
        for (phase, report) in outcome.mapped() {
            if let Some(reason) = shortfall(report, Stage::Second) {
                let sentence = format!("{}, {phase}: not everything was mapped: {reason}.", outcome.profile);
                let _ = writeln!(text, "{}", wrap(&sentence, 0));
            }
        }
    }
    if let Some(outcome) = outcomes.first() {
        let _ = write!(text, "\nMRTD  {}\n      the same as `premap td measure` computes", outcome.mrtd);
        text.push_str(if outcomes.len() > 1 { ", whatever the profile\n" } else { "\n" });
    }
    text
}

fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::InitVcpus => "KVM_TDX_INIT_VCPU on each vCPU",
        Phase::Reserve => {
            "the Secure-EPT of the firmware's memory, built ahead in parallel (where the KVM has that)"
        }
        Phase::Add => "PAGE.ADD and MR.EXTEND, page after page: the serial path",
        Phase::Finalize => "the measurement is final",
        Phase::MapRest => "all other memory given ahead by PAGE.AUG, in parallel (where the KVM has that)",
    }
}

fn phases(outcomes: &[Outcome]) -> Table {
    let mut table = table(outcomes, "phase");
    for phase in ALL {
        let cell = |outcome: &Outcome| {
            let report = outcome.launch.phases.iter().find(|report| report.phase == phase);
            report.map_or_else(String::new, |report| match report.bytes {
                0 => time(report.ns),
                bytes => format!("{} ({})", time(report.ns), Size(bytes)),
            })
        };
        table.add_row([phase.name().to_owned()].into_iter().chain(outcomes.iter().map(cell)));
    }
    let accept = outcomes.iter().map(|outcome| time(nanoseconds(outcome)));
    table.add_row(["accept".to_owned()].into_iter().chain(accept));
    let exits = outcomes.iter().map(|outcome| thousands(outcome.acceptance.exits));
    table.add_row(["exits".to_owned()].into_iter().chain(exits));
    right_aligned(table)
}

fn seamcalls(outcomes: &[Outcome]) -> Table {
    let mut table = table(outcomes, "SEAMCALL");
    let mut names: Vec<&str> =
        outcomes.iter().flat_map(|outcome| outcome.seamcalls.keys().copied()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let cell = |outcome: &Outcome| thousands(outcome.seamcalls.get(name).copied().unwrap_or(0));
        table.add_row([name.to_owned()].into_iter().chain(outcomes.iter().map(cell)));
    }
    right_aligned(table)
}

fn table(outcomes: &[Outcome], first: &str) -> Table {
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header([first].into_iter().chain(outcomes.iter().map(|outcome| outcome.profile.name())));
    table
}

fn right_aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
