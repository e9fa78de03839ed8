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
use crate::output::table::{rounds, spread};
use crate::output::{STYLE, wrap};
use crate::series::Series;
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
    /// The number of rounds: times and exits are medians over them, all else is of the round that mapped least.
    repeat: usize,
    samples: Vec<JsonSample>,
}

/// One round.
#[derive(Serialize)]
struct JsonSample {
    phases: Vec<JsonPhase>,
    reserve: JsonAccount,
    map_rest: JsonAccount,
    accept: JsonAccept,
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
pub(super) fn json(all: &[Series<Outcome>]) -> serde_json::Result<String> {
    let objects: Vec<Json<'_>> = all.iter().map(object).collect();
    let text = match objects.as_slice() {
        [one] => serde_json::to_string_pretty(one)?,
        all => serde_json::to_string_pretty(all)?,
    };
    Ok(text + "\n")
}

fn object(series: &Series<Outcome>) -> Json<'_> {
    let outcome = least(series);
    let JsonSample { phases, reserve, map_rest, accept } = sample(outcome, |figure| series.median(figure));
    let samples: Vec<_> = series.samples().map(|one| sample(one, |figure| figure(one))).collect();
    Json {
        profile: outcome.profile.name(),
        mrtd: outcome.mrtd.to_string(),
        phases,
        reserve,
        map_rest,
        seamcalls: &outcome.seamcalls,
        accept,
        demand_exits: outcome.demand_exits(),
        repeat: samples.len(),
        samples,
    }
}

/// What became of memory in `outcome`, with times and exits as `value` has them.
fn sample(outcome: &Outcome, value: impl Fn(&dyn Fn(&Outcome) -> u64) -> u64) -> JsonSample {
    let phases = outcome.launch.phases.iter().map(|report| JsonPhase {
        name: report.phase.name(),
        ns: value(&|outcome| outcome.phase_ns(report.phase)),
        bytes: report.bytes,
    });
    JsonSample {
        phases: phases.collect(),
        reserve: json_account(&outcome.launch.reserve),
        map_rest: json_account(&outcome.launch.rest),
        accept: JsonAccept {
            pages: outcome.acceptance.pages,
            exits: value(&|outcome| outcome.acceptance.exits),
            ns: value(&Outcome::accept_ns),
        },
    }
}

/// The round that mapped least.
fn least(series: &Series<Outcome>) -> &Outcome {
    series.least_by(|outcome| outcome.mapped().iter().map(|(_, report)| report.second.mapped).sum())
}

/// A launch has no host stage: private memory is the module's.
fn account(report: &Report) -> Account {
    Account::of(report.asked, &report.second)
}

fn json_account(report: &Report) -> JsonAccount {
    let reason = shortfall(report, Stage::Second).map(|reason| reason.to_string());
    JsonAccount { account: account(report), reason }
}

fn accounts(outcomes: &[&Outcome]) -> Table {
    let rows = outcomes.iter().flat_map(|outcome| {
        let row = |(phase, report): (Phase, _)| (outcome.profile.to_string(), phase.name(), account(report));
        outcome.mapped().map(row)
    });
    account::table("profile", rows)
}

/// The text.
pub(super) fn text(options: &Options, all: &[Series<Outcome>]) -> String {
    let outcomes: Vec<_> = all.iter().map(least).collect();
    let outcomes = outcomes.as_slice();
    let vcpus = counted(options.vcpus.into(), "vCPU");
    let headline = format!(
        "A TD with {} of memory and {vcpus}, launched from {} on the software KVM and a modelled TDX module. Times are \
         this machine's, not hardware's; calls and exits are exact. {}",
        options.memory,
        options.file.display(),
        rounds(options.repeat),
    );
    let mut text = format!("{}\n\n{}\n\n", wrap(&headline, 0), phases(all));
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

fn phases(all: &[Series<Outcome>]) -> Table {
    let outcomes: Vec<_> = all.iter().map(least).collect();
    let mut table = table(&outcomes, "phase");
    for phase in ALL {
        let cell = |series: &Series<Outcome>| {
            let report = least(series).launch.phases.iter().find(|report| report.phase == phase);
            report.map_or_else(String::new, |report| {
                let bytes = (report.bytes > 0).then(|| Size(report.bytes).to_string());
                spread(series.spread(|outcome| outcome.phase_ns(phase)), time, bytes.as_deref())
            })
        };
        table.add_row([phase.name().to_owned()].into_iter().chain(all.iter().map(cell)));
    }
    let accept = all.iter().map(|series| spread(series.spread(Outcome::accept_ns), time, None));
    table.add_row(["accept".to_owned()].into_iter().chain(accept));
    let exits =
        all.iter().map(|series| spread(series.spread(|outcome| outcome.acceptance.exits), thousands, None));
    table.add_row(["exits".to_owned()].into_iter().chain(exits));
    right_aligned(table)
}

fn seamcalls(outcomes: &[&Outcome]) -> Table {
    let mut table = table(outcomes, "SEAMCALL");
    let mut names: Vec<&str> =
        outcomes.iter().flat_map(|outcome| outcome.seamcalls.keys().copied()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let cell = |outcome: &&Outcome| thousands(outcome.seamcalls.get(name).copied().unwrap_or(0));
        table.add_row([name.to_owned()].into_iter().chain(outcomes.iter().map(cell)));
    }
    right_aligned(table)
}

fn table(outcomes: &[&Outcome], first: &str) -> Table {
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
