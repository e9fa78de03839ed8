//! What the boots came to, and whether that is enough: a pure function of what was measured.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::harm::Row;

/// Of the faults without premap, what may be left with it, in percent.
const MOST_FAULTS: u64 = 2;

/// Without premap or with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Without,
    With,
}

impl Side {
    pub(super) const fn strategy(self) -> &'static str {
        match self {
            Self::Without => "none",
            Self::With => "two-stage",
        }
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Without => "without",
            Self::With => "with",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} premap", self.word())
    }
}

/// What the nested guest's console showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Console {
    pub(super) text: String,
    /// When the marker came.
    pub(super) up: Option<Duration>,
}

/// What one boot came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    code: i32,
    console: String,
    boot_ns: u64,
    faults: u64,
}

impl Outcome {
    /// Puts a boot's outcome together from its console and the library's report.
    pub(super) fn new(code: i32, console: Console, report: &[u8]) -> Result<Self, String> {
        let up =
            console.up.ok_or_else(|| format!("the guest never came up; its console:\n{}", console.text))?;
        let report = String::from_utf8_lossy(report);
        let events = report.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let ended = events.into_iter().rfind(|event| event["event"] == "ended");
        let ended = ended.ok_or_else(|| format!("the report has no end:\n{report}"))?;
        let faults = ended["faults"].as_u64().ok_or_else(|| format!("no faults were counted: {ended}"))?;
        let boot_ns = u64::try_from(up.as_nanos()).unwrap_or(u64::MAX);
        Ok(Self { code, console: console.text, boot_ns, faults })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = Duration::from_nanos(self.boot_ns).as_secs_f64();
        write!(f, "{} faults, up after {seconds:.1} s, exit code {}", self.faults, self.code)
    }
}

/// What all boots came to.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    vmm: String,
    kernel: String,
    boots: u32,
    without: Sum,
    with: Sum,
    harm: Vec<Row>,
    #[serde(skip)]
    outcomes: Vec<Outcome>,
}

/// One side's boots: medians, and each boot's faults.
#[derive(Debug, Default, Serialize)]
struct Sum {
    faults: u64,
    boot_ns: u64,
    faults_each: Vec<u64>,
    #[serde(skip)]
    boot_ns_each: Vec<u64>,
}

impl Sum {
    fn add(&mut self, outcome: &Outcome) {
        self.faults_each.push(outcome.faults);
        self.boot_ns_each.push(outcome.boot_ns);
        self.faults = median(&self.faults_each);
        self.boot_ns = median(&self.boot_ns_each);
    }
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

impl Verdict {
    pub(super) fn new(vmm: String, kernel: &str, boots: u32) -> Self {
        let (without, with, harm, outcomes) = Default::default();
        Self { vmm, kernel: kernel.to_owned(), boots, without, with, harm, outcomes }
    }

    pub(super) fn add_row(&mut self, row: Row) {
        self.harm.push(row);
    }

    pub(super) fn add(&mut self, side: Side, outcome: Outcome) {
        match side {
            Side::Without => self.without.add(&outcome),
            Side::With => self.with.add(&outcome),
        }
        self.outcomes.push(outcome);
    }

    /// What is not as it should be, if anything.
    pub(super) fn shortfall(&self) -> Option<String> {
        let made = [&self.without, &self.with].map(|sum| sum.faults_each.len());
        if made.iter().any(|made| u32::try_from(*made).ok() != Some(self.boots)) {
            return Some(format!("of {} boots each, {made:?} were made", self.boots));
        }
        self.shortfall_of_boots().or_else(|| self.harm.iter().find_map(Row::shortfall))
    }

    fn shortfall_of_boots(&self) -> Option<String> {
        let first = self.outcomes.first()?;
        if let Some(other) = self.outcomes.iter().find(|other| other.console != first.console) {
            return Some(format!("the consoles differ:\n{}\nagainst\n{}", first.console, other.console));
        }
        if let Some(other) = self.outcomes.iter().find(|other| other.code != first.code) {
            return Some(format!("exit codes differ: {} and {}", first.code, other.code));
        }
        let limit = self.without.faults * MOST_FAULTS / 100;
        let most = self.with.faults_each.iter().max().copied().unwrap_or_default();
        (most > limit).then(|| {
            format!("{most} faults in a boot with premap; at most {limit}, {MOST_FAULTS} % of those without, are allowed")
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ns| Duration::from_nanos(ns).as_secs_f64();
        let Self { vmm, kernel, boots, without, with, harm, .. } = self;
        writeln!(f, "{vmm} on Linux {kernel}, {boots} boots each, medians")?;
        writeln!(
            f,
            "  without premap exec  {:>6} faults  {:>6.1} s",
            without.faults,
            seconds(without.boot_ns)
        )?;
        write!(f, "  with premap exec     {:>6} faults  {:>6.1} s", with.faults, seconds(with.boot_ns))?;
        harm.iter().try_for_each(|row| write!(f, "\n{row}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(faults: u64, console: &str, code: i32) -> Outcome {
        let console = Console { text: console.to_owned(), up: Some(Duration::from_secs(1)) };
        let report = format!("{{\"event\":\"mapped\"}}\n{{\"event\":\"ended\",\"faults\":{faults}}}\n");
        Outcome::new(code, console, report.as_bytes()).unwrap()
    }

    #[track_caller]
    fn check(outcomes: &[(Side, Outcome)], expected: Option<&str>) {
        let mut verdict = Verdict::new("vmm".to_owned(), "6.12", 2);
        for (side, outcome) in outcomes {
            verdict.add(*side, outcome.clone());
        }
        let got = verdict.shortfall();
        assert_eq!(got.is_some(), expected.is_some(), "{got:?}");
        assert!(got.unwrap_or_default().contains(expected.unwrap_or_default()));
    }

    fn with(last: Outcome) -> Vec<(Side, Outcome)> {
        let plain = outcome(10_000, "up", 0);
        vec![
            (Side::Without, plain.clone()),
            (Side::With, outcome(200, "up", 0)),
            (Side::Without, plain),
            (Side::With, last),
        ]
    }

    #[test]
    fn all_boots_must_be_made_and_agree_and_save_faults() {
        check(&with(outcome(200, "up", 0)), None);
        check(&with(outcome(201, "up", 0)), Some("201 faults"));
        check(&with(outcome(200, "up!", 0)), Some("consoles differ"));
        check(&with(outcome(200, "up", 1)), Some("exit codes differ"));
        check(&with(outcome(200, "up", 0))[..3], Some("were made"));
    }

    #[test]
    fn a_boot_without_marker_or_count_is_lost() {
        let console = |up| Console { text: "half".to_owned(), up };
        assert!(Outcome::new(0, console(None), b"").unwrap_err().contains("half"));
        let up = Some(Duration::from_secs(1));
        assert!(Outcome::new(0, console(up), b"").unwrap_err().contains("no end"));
        assert!(Outcome::new(0, console(up), b"{\"event\":\"ended\",\"faults\":null}").is_err());
    }

    #[test]
    fn medians_and_every_count_are_printed() {
        let mut verdict = Verdict::new("vmm".to_owned(), "6.12", 3);
        for faults in [3, 1, 2] {
            verdict.add(Side::With, outcome(faults, "", 0));
        }
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(
            (&json["with"]["faults"], &json["with"]["faults_each"]),
            (&2.into(), &serde_json::json!([3, 1, 2]))
        );
        assert_eq!((&json["vmm"], &json["boots"]), (&"vmm".into(), &3.into()));
        assert_eq!(json["with"]["boot_ns"], 1_000_000_000);
    }
}
