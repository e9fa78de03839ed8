//! What mapping ahead must save a booting Linux: all of its memory mapped, and a recorded working set alone.

use super::run::{Row, Run};
use super::{Case, Expectation, Kind, at_most, command, percent};

/// Small pages, so that there are faults to save.
const MACHINE: &str = "--guest linux --memory 256M --backing anon --json";
const SET: &str = "/tmp/linux.working-set";

/// Demand, both stages, and both stages within the budget of a working set that was recorded of another boot.
pub(super) fn case() -> Case {
    let run = |flags: &str| command(&format!("run {MACHINE} {flags}"));
    Case {
        name: "Linux boots on memory that is mapped ahead".to_owned(),
        before: vec![command(&format!("record {MACHINE} --out {SET}"))],
        commands: vec![
            run("--strategy demand"),
            run("--strategy two-stage"),
            run(&format!("--strategy two-stage --working-set {SET} --budget working-set")),
        ],
        expectations: BOOTS,
    }
}

const BOOTS: &[Expectation] = &[
    Expectation {
        what: "both stages leave a booting Linux a hundredth of demand's faults or fewer",
        kind: Kind::Count,
        judge: |runs| {
            let [demand, two, _] = boots(runs)?;
            at_most("faults", two.guest.faults, demand.guest.faults / 100)
        },
    },
    Expectation {
        what: "a working set is at most half of the memory",
        kind: Kind::Count,
        judge: |runs| {
            let [_, _, first] = boots(runs)?;
            at_most("bytes", first.second.bytes, first.pages * 4096 / 2)
        },
    },
    Expectation {
        what: "a working set alone leaves a tenth of demand's faults or fewer",
        kind: Kind::Count,
        judge: |runs| {
            let [demand, _, first] = boots(runs)?;
            at_most("faults", first.guest.faults, demand.guest.faults / 10)
        },
    },
    Expectation {
        what: "Linux is up no later than on demand, but for noise",
        kind: Kind::Time,
        judge: |runs| {
            let [demand, two, _] = boots(runs)?;
            let up = |row: &Row| row.boot_ns.ok_or("a row of the Linux guest has no boot_ns");
            at_most("boot ns", up(two)?, percent(up(demand)?, 110))
        },
    },
];

fn boots(runs: &[Run]) -> Result<[&Row; 3], String> {
    let [demand, two, first] = runs else { return Err("three runs are needed".to_owned()) };
    Ok([demand.row("demand")?, two.row("two-stage")?, first.row("two-stage")?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acceptance::tests::{check, row};
    use serde_json::Value;

    fn boot(strategy: &str, boot_ns: u64, faults: u64, bytes: u64) -> Vec<Value> {
        let mut row = row(strategy, 0, boot_ns, faults);
        row["boot_ns"] = boot_ns.into();
        row["second"]["bytes"] = bytes.into();
        vec![row]
    }

    #[test]
    fn a_boot_is_judged_by_faults_time_and_budget() {
        const HALF: u64 = 32 << 20;
        let demand = || boot("demand", 1000, 20_000, 0);
        let two = |boot_ns, faults| boot("two-stage", boot_ns, faults, 64 << 20);
        let first = |faults, bytes| boot("two-stage", 700, faults, bytes);
        check(BOOTS, &[demand(), two(1100, 200), first(2000, HALF)], &[]);
        check(BOOTS, &[demand(), two(700, 201), first(2000, HALF)], &["hundredth"]);
        check(BOOTS, &[demand(), two(700, 2), first(2001, HALF)], &["tenth"]);
        check(BOOTS, &[demand(), two(700, 2), first(2, HALF + 4096)], &["half of the memory"]);
        check(BOOTS, &[demand(), two(1101, 2), first(2, HALF)], &["no later"]);
    }
}
