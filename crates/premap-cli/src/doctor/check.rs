//! What was found: a line a check, and the verdict over all.

use std::fmt::Write;

use comfy_table::Table;
use serde::Serialize;

use crate::output::{STYLE, WIDTH, wrap};

/// How good a finding is for pre-mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    /// Nothing to change.
    Good,
    /// Works, with a limit or a hazard.
    Limited,
    /// Not to be had.
    Missing,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) check: &'static str,
    pub(super) status: Status,
    pub(super) result: String,
    /// What to change, where that helps.
    pub(super) advice: Option<String>,
}

impl Check {
    pub(super) fn new(check: &'static str, status: Status, result: impl Into<String>) -> Self {
        Self { check, status, result: result.into(), advice: None }
    }

    pub(super) fn good(check: &'static str, result: impl Into<String>) -> Self {
        Self::new(check, Status::Good, result)
    }

    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// The check whose status is the verdict.
pub(super) const TRIAL: &str = "two-stage trial";

/// All findings, and whether pre-mapping works at both stages.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    /// Whether pre-mapping works here at both stages.
    works: bool,
    checks: Vec<Check>,
}

impl Verdict {
    pub(super) fn of(checks: Vec<Check>) -> Self {
        let works = checks.iter().any(|check| check.check == TRIAL && check.status == Status::Good);
        Self { works, checks }
    }

    pub(super) fn works(&self) -> bool {
        self.works
    }

    pub(super) fn json(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }

    pub(super) fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(STYLE);
        table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
        table.set_width(u16::try_from(WIDTH).unwrap_or(u16::MAX));
        table.set_header(["", "check", "result", "what to change"]);
        for check in &self.checks {
            let mark = match check.status {
                Status::Good => "ok",
                Status::Limited => "note",
                Status::Missing => "no",
            };
            table.add_row([mark, check.check, &check.result, check.advice.as_deref().unwrap_or("")]);
        }
        let mut text = format!("{table}\n\n");
        let verdict = if self.works {
            "Pre-mapping works on this host, at both stages."
        } else {
            "Pre-mapping at both stages doesn't work on this host: see the two-stage trial above. The host stage alone works \
             everywhere, and so does the software KVM, `premap run --backend soft`."
        };
        let _ = writeln!(text, "{}", wrap(verdict, 0));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(trial: Status) -> Verdict {
        let limited = Check::new("kernel", Status::Limited, "6.12").advise("take 6.18");
        Verdict::of(vec![limited, Check::new(TRIAL, trial, "tried")])
    }

    #[test]
    fn the_trial_alone_decides() {
        assert!(verdict(Status::Good).works());
        assert!(!verdict(Status::Limited).works());
        assert!(!verdict(Status::Missing).works());
        assert!(!Verdict::of(vec![Check::good("kernel", "7.2")]).works());
    }

    #[test]
    fn text_and_json_hold_every_finding() {
        let text = verdict(Status::Good).text();
        for part in ["kernel", "6.12", "take 6.18", TRIAL, "works on this host, at both stages"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let json: serde_json::Value =
            serde_json::from_str(&verdict(Status::Missing).json().unwrap()).unwrap();
        assert_eq!(json["works"], false);
        assert_eq!(json["checks"][0]["advice"], "take 6.18");
        assert_eq!(json["checks"][1]["status"], "missing");
    }
}
