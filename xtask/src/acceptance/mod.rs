//! What `premap run` must achieve on a kernel with the pre-fault ioctl.
//!
//! A [`Case`] is data: commands of `premap`, and expectations on the JSON that they print. Judging is a pure function
//! of that JSON, so it is tested here without a kernel. An expectation is on counts, which are exact, or on times,
//! which an emulator on a busy machine makes noisy: [`Kind`] says which. Only times may be measured again, and they are
//! judged by the shortest of all attempts, since what disturbs a measurement only ever makes it longer. How many faults a
//! guest takes while it is being mapped is such a time too: it says who was faster.

mod linux;
mod run;

use run::Row;
pub(crate) use run::Run;

/// How many times a case whose times fall short is measured in all.
pub(crate) const ATTEMPTS: usize = 3;

/// Whether an expectation may be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Count,
    Time,
}

/// The figures that were compared; as an error, those that fall short.
type Verdict = Result<String, String>;

/// One thing expected of the runs of a case.
pub(crate) struct Expectation {
    pub(crate) what: &'static str,
    pub(crate) kind: Kind,
    judge: fn(&[Run]) -> Verdict,
}

impl Expectation {
    /// Judges the runs of the case, in the order of its commands.
    pub(crate) fn judge(&self, runs: &[Run]) -> Verdict {
        (self.judge)(runs)
    }
}

/// Commands, and what is expected of them together.
pub(crate) struct Case {
    pub(crate) name: String,
    /// Arguments of `premap`, for what has to be there first.
    pub(crate) before: Vec<Vec<String>>,
    /// Arguments of `premap` that make it print JSON.
    pub(crate) commands: Vec<Vec<String>>,
    pub(crate) expectations: &'static [Expectation],
}

/// All strategies on small pages: the gain that premap is for.
const GAIN: &[Expectation] = &[
    Expectation {
        what: "every strategy ran, with the second stage supported",
        kind: Kind::Count,
        judge: complete,
    },
    Expectation {
        what: "demand faults on every page",
        kind: Kind::Count,
        judge: |runs| {
            let row = only(runs)?.row("demand")?;
            at_least("faults", row.guest.faults, row.pages)
        },
    },
    Expectation {
        what: "the second stage alone costs 1.9 faults a page or more",
        kind: Kind::Count,
        judge: |runs| {
            let row = only(runs)?.row("second-only")?;
            at_least("faults", row.guest.faults, percent(row.pages, 190))
        },
    },
    Expectation {
        what: "both stages leave no more than 16 faults, or one in a thousand pages",
        kind: Kind::Count,
        judge: |runs| {
            let row = only(runs)?.row("two-stage")?;
            at_most("faults", row.guest.faults, (row.pages / 1000).max(16))
        },
    },
    Expectation {
        what: "after both stages the guest needs a thirtieth of demand's time or less",
        kind: Kind::Time,
        judge: |runs| {
            let run = only(runs)?;
            at_most("guest ns", run.row("two-stage")?.guest.ns, run.row("demand")?.guest.ns / 30)
        },
    },
    Expectation {
        what: "both stages and the guest take 0.35 of demand's total or less",
        kind: Kind::Time,
        judge: |runs| {
            let (two, demand) = (only(runs)?.row("two-stage")?, only(runs)?.row("demand")?);
            at_most("ns", two.ahead_ns() + two.guest.ns, percent(demand.total_ns, 35))
        },
    },
];

/// Any backing: both stages are never worse than another strategy.
const NEVER_WORSE: &[Expectation] = &[
    Expectation {
        what: "every strategy ran, with the second stage supported",
        kind: Kind::Count,
        judge: complete,
    },
    Expectation {
        what: "both stages leave no more faults than any other strategy",
        kind: Kind::Count,
        judge: |runs| {
            let run = only(runs)?;
            let fewest = run.0.iter().map(|row| row.guest.faults).min().unwrap_or_default();
            at_most("faults", run.row("two-stage")?.guest.faults, fewest)
        },
    },
    Expectation {
        what: "after both stages the guest is no slower than on demand",
        kind: Kind::Time,
        judge: |runs| {
            let run = only(runs)?;
            at_most("guest ns", run.row("two-stage")?.guest.ns, run.row("demand")?.guest.ns)
        },
    },
];

/// The same memory with one vCPU and then with two.
const PARALLEL: &[Expectation] = &[Expectation {
    what: "two vCPUs map in 0.7 of the time of one or less",
    kind: Kind::Time,
    judge: |runs| {
        let [one, two] = runs else { return Err("two runs are needed".to_owned()) };
        let (one, two) = (one.row("two-stage")?, two.row("two-stage")?);
        if (one.vcpus, two.vcpus) != (1, 2) {
            return Err(format!("the runs had {} and {} vCPUs", one.vcpus, two.vcpus));
        }
        at_most("ns", two.ahead_ns(), percent(one.ahead_ns(), 70))
    },
}];

/// Demand, and then mapping on a spare vCPU while the guest runs.
const MEANWHILE: &[Expectation] = &[
    Expectation {
        what: "in the background both stages map every byte",
        kind: Kind::Count,
        judge: |runs| {
            let row = pair(runs)?.1;
            let bytes = row.host.bytes.min(row.second.bytes);
            at_least("bytes", bytes, row.pages * 4096)
        },
    },
    Expectation {
        what: "a guest mapped meanwhile takes 0.4 of demand's faults or fewer",
        kind: Kind::Time,
        judge: |runs| {
            let (demand, meanwhile) = pair(runs)?;
            at_most("faults", meanwhile.guest.faults, percent(demand.guest.faults, 40))
        },
    },
    Expectation {
        what: "a guest mapped meanwhile runs in half of demand's time or less",
        kind: Kind::Time,
        judge: |runs| {
            let (demand, meanwhile) = pair(runs)?;
            at_most("guest ns", meanwhile.guest.ns, demand.guest.ns / 2)
        },
    },
];

/// Returns every case, in the order in which they run.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![Case {
        name: "the gain over demand paging".to_owned(),
        before: Vec::new(),
        commands: vec![command("run --memory 64M --backing anon --strategy all --json")],
        expectations: GAIN,
    }];
    for backing in ["memfd", "thp", "hugetlb", "file"] {
        cases.push(Case {
            name: format!("never worse, on {backing}"),
            before: Vec::new(),
            commands: vec![command(&format!("run --memory 64M --backing {backing} --strategy all --json"))],
            expectations: NEVER_WORSE,
        });
    }
    let with_vcpus = |count| {
        command(&format!("run --memory 256M --backing anon --vcpus {count} --strategy two-stage --json"))
    };
    cases.push(Case {
        name: "the gain of a second vCPU".to_owned(),
        before: Vec::new(),
        commands: vec![with_vcpus(1), with_vcpus(2)],
        expectations: PARALLEL,
    });
    let with_strategy = |strategy| command(&format!("run --memory 128M --strategy {strategy} --json"));
    cases.push(Case {
        name: "mapping while the guest runs".to_owned(),
        before: Vec::new(),
        commands: vec![with_strategy("demand"), with_strategy("background")],
        expectations: MEANWHILE,
    });
    cases.push(linux::case());
    cases
}

fn command(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn pair(runs: &[Run]) -> Result<(&Row, &Row), String> {
    let [demand, meanwhile] = runs else { return Err("two runs are needed".to_owned()) };
    Ok((demand.row("demand")?, meanwhile.row("background")?))
}

fn only(runs: &[Run]) -> Result<&Run, String> {
    let [run] = runs else { return Err(format!("one run is needed, there are {}", runs.len())) };
    Ok(run)
}

fn complete(runs: &[Run]) -> Verdict {
    let run = only(runs)?;
    for strategy in ["demand", "second-only", "host-only", "two-stage"] {
        let row = run.row(strategy)?;
        if strategy == "two-stage" && !row.second.supported {
            return Err(format!("{strategy} had no second stage on {}", row.backing));
        }
    }
    Ok(format!("{} rows", run.0.len()))
}

fn at_most(what: &str, value: u64, limit: u64) -> Verdict {
    compare(value <= limit, format!("{what}: {value}, at most {limit}"))
}

fn at_least(what: &str, value: u64, limit: u64) -> Verdict {
    compare(value >= limit, format!("{what}: {value}, at least {limit}"))
}

fn compare(holds: bool, figures: String) -> Verdict {
    if holds { Ok(figures) } else { Err(figures) }
}

fn percent(value: u64, share: u64) -> u64 {
    value.saturating_mul(share) / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(super) fn row(strategy: &str, ahead_ns: u64, guest_ns: u64, faults: u64) -> Value {
        json!({
            "backend": "kvm", "kernel": "6.12", "strategy": strategy, "backing": "anon",
            "memory_bytes": 67_108_864, "pages": 16_384, "vcpus": 1,
            "host": {"ns": ahead_ns / 2, "bytes": 67_108_864},
            "second": {"ns": ahead_ns / 2, "bytes": 67_108_864, "calls": 4, "supported": true, "reason": null},
            "guest": {"ns": guest_ns, "faults": faults, "exits": 1},
            "mapped": {"pages_4k": 16_384, "pages_2m": 0, "pages_1g": 0},
            "total_ns": ahead_ns + guest_ns,
        })
    }

    fn good() -> Vec<Value> {
        vec![
            row("demand", 0, 3000, 16_388),
            row("second-only", 500, 4000, 32_768),
            row("host-only", 500, 1500, 16_388),
            row("two-stage", 900, 100, 4),
        ]
    }

    pub(super) fn check(expectations: &[Expectation], runs: &[Vec<Value>], failing: &[&str]) {
        let runs: Vec<_> =
            runs.iter().map(|rows| Run::parse(&serde_json::to_vec(rows).unwrap()).unwrap()).collect();
        let failed: Vec<_> =
            expectations.iter().filter(|one| one.judge(&runs).is_err()).map(|one| one.what).collect();
        assert_eq!(failed.len(), failing.len(), "{failed:?}");
        for (failed, failing) in failed.iter().zip(failing) {
            assert!(failed.contains(failing), "{failed}");
        }
    }

    #[test]
    fn good_figures_pass() {
        check(GAIN, &[good()], &[]);
        check(NEVER_WORSE, &[good()], &[]);
    }

    #[test]
    fn each_shortfall_is_told() {
        let with = |at: usize, row: Value| {
            let mut rows = good();
            rows[at] = row;
            rows
        };
        check(GAIN, &[with(0, row("demand", 0, 3000, 16_383))], &["demand faults"]);
        check(GAIN, &[with(1, row("second-only", 500, 4000, 31_000))], &["1.9 faults"]);
        check(GAIN, &[with(3, row("two-stage", 900, 100, 17))], &["16 faults"]);
        check(GAIN, &[with(3, row("two-stage", 900, 101, 4))], &["thirtieth"]);
        check(GAIN, &[with(3, row("two-stage", 960, 100, 4))], &["0.35"]);
        check(NEVER_WORSE, &[with(2, row("host-only", 500, 1500, 3))], &["no more faults"]);
        check(NEVER_WORSE, &[with(3, row("two-stage", 900, 3001, 4))], &["no slower"]);
    }

    #[test]
    fn a_missing_strategy_and_a_missing_second_stage_fail() {
        let mut rows = good();
        rows.remove(2);
        check(NEVER_WORSE, &[rows], &["every strategy"]);
        let mut rows = good();
        rows[3]["second"]["supported"] = json!(false);
        check(NEVER_WORSE, &[rows], &["every strategy"]);
    }

    #[test]
    fn mapping_meanwhile_is_compared_with_demand() {
        let demand = vec![row("demand", 0, 3000, 16_388)];
        let meanwhile = |guest, faults| vec![row("background", 900, guest, faults)];
        check(MEANWHILE, &[demand.clone(), meanwhile(1500, 6_555)], &[]);
        check(MEANWHILE, &[demand.clone(), meanwhile(1501, 6_556)], &["0.4 of demand's faults", "half"]);
        let mut short = meanwhile(1, 1);
        short[0]["second"]["bytes"] = json!(67_108_863);
        check(MEANWHILE, &[demand, short], &["every byte"]);
    }

    #[test]
    fn two_vcpus_are_compared_with_one() {
        let run = |vcpus: u64, ns| {
            let mut row = row("two-stage", ns, 100, 4);
            row["vcpus"] = json!(vcpus);
            vec![row]
        };
        check(PARALLEL, &[run(1, 1000), run(2, 700)], &[]);
        check(PARALLEL, &[run(1, 1000), run(2, 702)], &["two vCPUs"]);
        check(PARALLEL, &[run(1, 1000), run(1, 500)], &["two vCPUs"]);
        check(PARALLEL, &[run(1, 1000)], &["two vCPUs"]);
    }
}
