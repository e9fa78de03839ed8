//! The text of `premap run`, for somebody who has read nothing else: what was done, what each strategy cost beside
//! demand, and what that means.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table};
use premap::{StageReport, Stages};
use premap_address::PAGE_SIZE;
use premap_guest::{Access, Order};

use super::{STYLE, meaning, wrap};
use crate::first_touch::Outcome;
use crate::linux_guest::Guest;
use crate::run::Common;
use crate::size::{Size, thousands, time};
use crate::strategy::Strategy;

/// The whole text.
pub(crate) fn text(common: &Common, outcomes: &[Outcome]) -> String {
    let mut text = format!("{}\n\n{}\n\n", wrap(&headline(common), 0), table(outcomes));
    for outcome in outcomes {
        let _ = writeln!(text, "{:11}  {}", outcome.strategy.name(), outcome.strategy.meaning());
    }
    text.push_str(
        "\nfaults       touches for which KVM had to map a page first\n\
         exits        returns from the guest to KVM, for whatever reason\n\
         (n×)         beside demand\n",
    );
    for sentence in meaning::sentences(common, outcomes) {
        let _ = write!(text, "\n{}\n", wrap(&sentence, 0));
    }
    text
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
    let vcpus = if setting.vcpus == 1 { "1 vCPU".to_owned() } else { format!("{} vCPUs", setting.vcpus) };
    let kvm = match common.backend {
        "soft" => format!("the software KVM, as Linux {}", common.kernel),
        _ => format!("/dev/kvm, Linux {}", common.kernel),
    };
    let (memory, backing) = (Size(setting.bytes), setting.backing);
    match common.guest {
        Guest::FirstTouch => format!(
            "For each strategy, a fresh guest with {memory} of memory ({backing}) {does} one word of each of its {} pages \
             of 4 KiB, in {order} order, on {vcpus} of {kvm}.",
            thousands(setting.bytes / PAGE_SIZE),
        ),
        Guest::Linux => format!(
            "For each strategy, Linux boots in a fresh machine with {memory} of memory ({backing}), on {vcpus} of {kvm}."
        ),
    }
}

fn table(outcomes: &[Outcome]) -> Table {
    let demand = outcomes.iter().find(|outcome| outcome.strategy == Strategy::Demand);
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header(["strategy", "faults", "exits", "host stage", "second stage", "in the guest", "total"]);
    for outcome in outcomes {
        let stages = outcome.strategy.stages();
        let asked = outcome.report.asked;
        let stage = |present: bool, report: &StageReport| match report.mapped {
            _ if !present => "-".to_owned(),
            _ if report.unsupported.is_some() => "unsupported".to_owned(),
            mapped if mapped < asked => format!("{} (partly)", time(report.ns)),
            _ => time(report.ns),
        };
        let beside = |text: String, of: fn(&Outcome) -> u64| {
            let ratio = demand.and_then(|demand| ratio(of(outcome), of(demand)));
            ratio.map_or_else(|| text.clone(), |ratio| format!("{text} ({ratio})"))
        };
        let has_host = matches!(stages, Some(Stages::Host | Stages::Both));
        let has_second = matches!(stages, Some(Stages::Second | Stages::Both));
        table.add_row([
            outcome.strategy.name().to_owned(),
            beside(thousands(outcome.faults), |outcome| outcome.faults),
            beside(thousands(outcome.exits), |outcome| outcome.exits),
            stage(has_host, &outcome.report.host),
            stage(has_second, &outcome.report.second),
            beside(time(outcome.guest_ns), |outcome| outcome.guest_ns),
            beside(time(outcome.total_ns()), Outcome::total_ns),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
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
