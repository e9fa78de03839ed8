//! What became of each byte that a stage was asked to map.

use comfy_table::{CellAlignment, Table};
use premap::{Reason, Report, Stage, StageReport, Stages};
use serde::Serialize;

use super::STYLE;
use crate::size::thousands;

/// The account of a stage, in bytes: `asked` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Account {
    /// What the stage was to map.
    pub(crate) asked: u64,
    /// Mapped, or found so.
    pub(crate) mapped: u64,
    /// Nothing to do, or no way to: another stage's, no memslot, or a stage that this KVM lacks.
    pub(crate) skipped: u64,
    /// Refused by the kernel.
    pub(crate) failed: u64,
    /// Not reached, or given up: a budget, a deadline, a KVM that stayed busy.
    pub(crate) abandoned: u64,
}

impl Account {
    /// The account of a stage of which so many bytes were asked.
    pub(crate) fn of(asked: u64, stage: &StageReport) -> Self {
        let StageReport { mapped, skipped, failed, abandoned, .. } = *stage;
        Self { asked, mapped, skipped, failed, abandoned }
    }
}

/// The first reason why a stage that was asked for did not map everything, if it did not.
pub(crate) fn shortfall(report: &Report, stage: Stage) -> Option<Reason> {
    let reasons = report.unmapped.iter().filter(|lost| lost.stage == stage).map(|lost| lost.reason);
    reasons.into_iter().find(|reason| *reason != Reason::NotAsked)
}

/// The accounts of those stages that a run had, with their names; of none there is one that is empty.
pub(crate) fn of_stages(report: &Report, stages: Option<Stages>) -> Vec<(&'static str, Account)> {
    let host = ("host", Account::of(report.asked, &report.host));
    let second = ("second", Account::of(report.asked, &report.second));
    match stages {
        None => vec![("-", Account::default())],
        Some(Stages::Host) => vec![host],
        Some(Stages::Second) => vec![second],
        Some(Stages::Both) => vec![host, second],
    }
}

/// The accounts by what they are of, in KiB: bytes of guest memory are always whole ones.
pub(crate) fn table(first: &str, rows: impl IntoIterator<Item = (String, &'static str, Account)>) -> Table {
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header([first, "stage", "asked, KiB", "mapped", "skipped", "failed", "abandoned"]);
    for (name, stage, account) in rows {
        let Account { asked, mapped, skipped, failed, abandoned } = account;
        let sums = [asked, mapped, skipped, failed, abandoned].map(|bytes| thousands(bytes / 1024));
        table.add_row([name, stage.to_owned()].into_iter().chain(sums));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
