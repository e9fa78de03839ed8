//! The text of `premap run`, for somebody who has read nothing else: what was done, what each strategy cost beside
//! demand, and what that means.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table};
use premap::{StageReport, Stages};
use premap_address::PAGE_SIZE;
use premap_guest::{Access, Order};

use super::{STYLE, account, meaning, wrap};
use crate::first_touch::Outcome;
use crate::linux_guest::Guest;
use crate::run::Common;
use crate::series::{Figure, Series, Spread};
use crate::size::{Size, counted, thousands, time};
use crate::strategy::Strategy;

/// What the columns of the accounts mean.
const ACCOUNTS: &str = "asked        what a stage was to map: the sum of the other four\n\
                        skipped      nothing to do, or no way to do it here\n\
                        failed       refused by the kernel\n\
                        abandoned    not reached, or given up";

/// The whole text.
pub(crate) fn text(common: &Common, all: &[Series]) -> String {
    let mut text = format!("{}\n\n{}\n\n", wrap(&headline(common), 0), table(all));
    for series in all {
        let _ = writeln!(text, "{:11}  {}", series.strategy().name(), series.strategy().meaning());
    }
    text.push_str("\nfaults       touches for which KVM had to map a page first");
    text.push_str(match common.guest {
        Guest::FirstTouch => "\n",
        // Timers and the guest's own threads make each boot a little different.
        Guest::Linux => "; of Linux they differ from boot to boot\n",
    });
    text.push_str(
        "exits        returns from the guest to KVM, for whatever reason\n(n×)         beside demand\n",
    );
    let _ = write!(text, "\n{}\n\n{ACCOUNTS}\n", accounts(all));
    let _ = write!(text, "\n{}\n", wrap(&rounds(common.rounds), 0));
    for sentence in meaning::sentences(common, all) {
        let _ = write!(text, "\n{}\n", wrap(&sentence, 0));
    }
    text
}

/// How well the figures are known.
pub(crate) fn rounds(rounds: u32) -> String {
    match rounds {
        1 => "Each figure is one sample, whose spread is unknown: `--repeat 5` shows it.".to_owned(),
        rounds => format!(
            "Figures are medians of {rounds} rounds, in each of which all were measured, with the lowest and the highest \
             beneath."
        ),
    }
}

/// What became of the memory, stage by stage, in the round that mapped least.
fn accounts(all: &[Series]) -> Table {
    let rows = all.iter().flat_map(|series| {
        let strategy = series.strategy();
        let stages = account::of_stages(&series.least().report, strategy.stages());
        stages.into_iter().map(move |(stage, account)| (strategy.name().to_owned(), stage, account))
    });
    account::table("strategy", rows)
}

/// What was done, and on what.
fn headline(common: &Common) -> String {
    let setting = &common.setting;
    let does = match setting.access {
        Access::Write => "writes",
        Access::Read => "reads",
    };
    let order = match setting.order {
        Order::Ascending => "ascending",
        Order::Random => "random",
    };
    let vcpus = counted(setting.vcpus.into(), "vCPU");
    let kvm = match common.backend {
        "soft" => format!("the software KVM, as Linux {}", common.kernel),
        _ => format!("/dev/kvm, Linux {}", common.kernel),
    };
    let (memory, backing) = (Size(setting.bytes), setting.backing);
    match common.guest {
        Guest::FirstTouch => format!(
            "For each strategy, a fresh guest with {memory} of memory ({backing}) {does} one word of each of its {} \
             of 4 KiB, in {order} order, on {vcpus} of {kvm}.",
            counted(setting.bytes / PAGE_SIZE, "page"),
        ),
        Guest::Linux => format!(
            "For each strategy, Linux boots in a fresh machine with {memory} of memory ({backing}), on {vcpus} of {kvm}."
        ),
    }
}

fn table(all: &[Series]) -> Table {
    let demand = all.iter().find(|series| series.strategy() == Strategy::Demand);
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header(["strategy", "faults", "exits", "host stage", "second stage", "in the guest", "total"]);
    for series in all {
        let stages = series.strategy().stages();
        let least = &series.least().report;
        let stage = |present: bool, report: &StageReport, ns: Figure| match report.mapped {
            _ if !present => "-".to_owned(),
            _ if report.unsupported.is_some() => "unsupported".to_owned(),
            mapped if mapped < least.asked => spread(series.spread(ns), time, Some("partly")),
            _ => spread(series.spread(ns), time, None),
        };
        let beside = |show: fn(u64) -> String, of: Figure| {
            let ratio = demand.and_then(|demand| ratio(series.median(of), demand.median(of)));
            spread(series.spread(of), show, ratio.as_deref())
        };
        let has_host = matches!(stages, Some(Stages::Host | Stages::Both));
        let has_second = matches!(stages, Some(Stages::Second | Stages::Both));
        table.add_row([
            series.strategy().name().to_owned(),
            beside(thousands, |outcome| outcome.faults),
            beside(thousands, |outcome| outcome.exits),
            stage(has_host, &least.host, |outcome| outcome.report.host.ns),
            stage(has_second, &least.second, |outcome| outcome.report.second.ns),
            beside(time, |outcome| outcome.guest_ns),
            beside(time, Outcome::total_ns),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A figure with what there is to add, and its bounds beneath where they differ.
pub(crate) fn spread(spread: Spread, show: fn(u64) -> String, note: Option<&str>) -> String {
    let Spread { median, min, max } = spread;
    let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
    if min == max {
        return format!("{}{note}", show(median));
    }
    let (min, max) = (show(min), show(max));
    // A unit that both have is written once.
    let unit = |text: &str| text.rsplit_once(' ').map(|(_, unit)| unit.to_owned());
    let from = match min.rsplit_once(' ') {
        Some((number, _)) if unit(&min) == unit(&max) => number,
        _ => min.as_str(),
    };
    format!("{}{note}\n{from}–{max}", show(median))
}

/// A value as a multiple of demand's; nothing where that is 0.
pub(super) fn ratio(value: u64, demand: u64) -> Option<String> {
    if demand == 0 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "it is rounded to three digits anyway")]
    let ratio = value as f64 / demand as f64;
    Some(match ratio {
        0.0 => "0×".to_owned(),
        ..0.001 => "<0.001×".to_owned(),
        ..0.1 => format!("{ratio:.3}×"),
        ..10.0 => format!("{ratio:.2}×"),
        _ => format!("{ratio:.0}×"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_told_where_there_are_any() {
        let told = |median, min, max, note| spread(Spread { median, min, max }, time, note);
        assert_eq!(told(5_000, 5_000, 5_000, Some("partly")), "5.00 µs (partly)");
        assert_eq!(told(5_000, 1_000, 7_000, Some("1.00×")), "5.00 µs (1.00×)\n1.00–7.00 µs");
        assert_eq!(told(5_000, 900, 7_000, None), "5.00 µs\n900 ns–7.00 µs");
        assert_eq!(told(5_000, 0, 7_000, None), "5.00 µs\n0–7.00 µs");
    }

    #[test]
    fn ratios_have_the_digits_that_matter() {
        for (value, demand, text) in [
            (0, 5, "0×"),
            (1, 100_000, "<0.001×"),
            (4, 1_000, "0.004×"),
            (1, 4, "0.25×"),
            (32_768, 16_384, "2.00×"),
            (120, 10, "12×"),
        ] {
            assert_eq!(ratio(value, demand).as_deref(), Some(text));
        }
        assert_eq!(ratio(3, 0), None);
    }
}
