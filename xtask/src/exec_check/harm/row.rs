//! What a row shows, and whether that is harm: a pure function of what was measured.

use std::collections::BTreeMap;
use std::fmt;

use clap::ValueEnum;
use serde::{Serialize, Serializer};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Memory of the VMM's own and of the library's by which one run differs from the next.
const MEMORY_SLACK: u64 = 64 * MIB;
/// The boot memory beside a pool that the guest was not given yet.
const BOOT_MEMORY: u64 = 256 * MIB;
/// Space on disk by which one run may differ from the next: the firmware's own pages, and what the file system keeps.
const DISK_SLACK: u64 = MIB;
/// The most calls that a GiB may cost whose backing store is full.
const MOST_CALLS: u64 = 1_000;
/// By how much an answer may come later than without premap. It is 100 ms on a processor; the lab emulates one, some ten
/// times slower, and maps a GiB in 4 s and more.
const MOST_DELAY_MS: u64 = 1_000;

/// What could harm a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum Case {
    /// A memory cgroup with room for the VMM and not for all of the guest's memory
    MemoryCgroup,
    /// A virtio-mem pool, of which the guest was given nothing
    VirtioMem,
    /// Guest memory in a file, in a file system that has no room for it
    FullTmpfs,
    /// Guest memory in a file with holes, on a disk
    SparseFile,
    /// The monitor's `stop` while memory is mapped
    Paused,
    /// The monitor's `quit` while memory is mapped
    Quit,
    /// SIGTERM while memory is mapped
    Terminated,
}

impl Case {
    pub(in super::super) fn all() -> &'static [Self] {
        Self::value_variants()
    }

    /// The name, as JSON, the command line and the script have it.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is about time.
    pub(super) const fn is_timed(self) -> bool {
        matches!(self, Self::Paused | Self::Quit | Self::Terminated)
    }

    /// What premap made worse, if anything.
    fn harm(self, without: &Seen, with: &Seen) -> Option<String> {
        let at_most = |name: &'static str, limit: u64| {
            let value = with.figures.get(name).copied();
            match value {
                None => Some(format!("no {name} was measured")),
                Some(value) => {
                    (value > limit).then(|| format!("{name} is {value}; at most {limit} is allowed"))
                }
            }
        };
        let at_most_more = |name: &'static str, more: u64| match without.figures.get(name) {
            None => Some(format!("no {name} was measured without premap")),
            Some(value) => at_most(name, value + more),
        };
        let must_say = |what: &[&str]| {
            let missing = !what.iter().any(|words| with.said.to_lowercase().contains(words));
            missing.then(|| format!("nothing was said of {what:?}; said was: {:?}", with.said))
        };
        let ended_otherwise = ((without.alive, without.exit) != (with.alive, with.exit)).then(|| {
            let [alone, under] = [without, with].map(Seen::fate);
            format!("the VMM {under}; without premap it {alone}; said was: {:?}", with.said)
        });
        // Where it is held back and then stopped, how far it got is chance.
        let must_boot =
            matches!(self, Self::MemoryCgroup | Self::VirtioMem | Self::FullTmpfs | Self::SparseFile);
        let booted_otherwise = (must_boot && without.booted && !with.booted)
            .then(|| format!("the guest's firmware did not get to its end; said was: {:?}", with.said));
        ended_otherwise.or(booted_otherwise).or_else(|| match self {
            Self::MemoryCgroup => must_say(&["cgroup", "memory.max"]),
            Self::VirtioMem => at_most_more("resident_bytes", BOOT_MEMORY + MEMORY_SLACK),
            Self::FullTmpfs => at_most("calls", MOST_CALLS).or_else(|| must_say(&["no space left"])),
            Self::SparseFile => at_most_more("disk_bytes", DISK_SLACK),
            Self::Paused => at_most_more("stop_ms", MOST_DELAY_MS),
            Self::Quit | Self::Terminated => at_most_more("ended_ms", MOST_DELAY_MS),
        })
    }
}

/// What one side showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Seen {
    /// Whether the VMM still ran at the end.
    alive: bool,
    /// What it had ended with, else.
    exit: Option<u64>,
    /// Whether the firmware got to its end.
    booted: bool,
    #[serde(flatten)]
    figures: BTreeMap<String, u64>,
    #[serde(skip)]
    said: String,
}

impl Seen {
    /// Reads what the script printed.
    ///
    /// # Errors
    ///
    /// What is missing, or a line that is none of the script's.
    pub(super) fn parse(output: &str, said: &str) -> Result<Self, String> {
        let mut figures = BTreeMap::new();
        let mut calls = None;
        for line in output.lines() {
            let (name, value) = line.split_once(' ').ok_or_else(|| format!("no figure: {line:?}"))?;
            if name == "report" {
                calls = Some(calls.unwrap_or_default() + host_calls(value));
                continue;
            }
            let value = value.parse().map_err(|_| format!("no number: {line:?}"))?;
            figures.insert(name.to_owned(), value);
        }
        figures.extend(calls.map(|calls| ("calls".to_owned(), calls)));
        let mut flag = |name: &str| figures.remove(name).map(|value| value == 1);
        let alive = flag("alive").ok_or("nothing tells whether the VMM is alive")?;
        let booted = flag("booted").ok_or("nothing tells whether the firmware got to its end")?;
        let exit = figures.remove("exit");
        Ok(Self { alive, exit, booted, figures, said: said.trim().to_owned() })
    }

    fn fate(&self) -> String {
        self.exit.map_or_else(|| "lived".to_owned(), |code| format!("ended with {code}"))
    }
}

/// The host stage's calls in a line of the library's report. A line that was cut off by the VMM's end has none.
fn host_calls(line: &str) -> u64 {
    let event: Value = serde_json::from_str(line).unwrap_or_default();
    event["report"]["host"]["calls"].as_u64().unwrap_or_default()
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fate())?;
        self.figures.iter().try_for_each(|(name, value)| write!(f, ", {name} {value}"))
    }
}

/// One case on both sides.
#[derive(Clone, Debug, Serialize)]
pub(in super::super) struct Row {
    case: Case,
    without: Seen,
    with: Seen,
    #[serde(rename = "ok", serialize_with = "is_none")]
    harm: Option<String>,
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn is_none<S: Serializer>(harm: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(harm.is_none())
}

impl Row {
    pub(super) fn new(case: Case, without: Seen, with: Seen) -> Self {
        let harm = case.harm(&without, &with);
        Self { case, without, with, harm }
    }

    /// What premap made worse, if anything.
    pub(in super::super) fn shortfall(&self) -> Option<String> {
        self.harm.as_ref().map(|harm| format!("harm in {}: {harm}", self.case.name()))
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.harm.is_none() { "ok" } else { "HARM" };
        let Self { case, without, with, .. } = self;
        write!(f, "  {word:4} {:13}  without: {without}; with: {with}", case.name())?;
        self.harm.iter().try_for_each(|harm| write!(f, "\n       {harm}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(figures: &str, said: &str) -> Seen {
        Seen::parse(&format!("alive 1\nbooted 1\n{}", figures.replace(", ", "\n")), said).unwrap()
    }

    #[track_caller]
    fn check(case: Case, without: &str, with: Seen, expected: Option<&str>) {
        let row = Row::new(case, seen(without, ""), with);
        let harm = row.shortfall();
        assert_eq!(harm.is_some(), expected.is_some(), "{harm:?}");
        assert!(harm.unwrap_or_default().contains(expected.unwrap_or_default()));
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["ok"], expected.is_none());
        assert_eq!(json.as_object().unwrap().len(), 4, "{json}");
    }

    #[test]
    fn what_is_worse_with_premap_is_harm() {
        let quiet = |figures: &str| seen(figures, "");
        let limit = BOOT_MEMORY + MEMORY_SLACK;
        let resident = |more: u64| quiet(&format!("resident_bytes {}", 100 + more));
        check(Case::VirtioMem, "resident_bytes 100", resident(limit), None);
        check(Case::VirtioMem, "resident_bytes 100", resident(limit + 1), Some("resident_bytes"));
        check(Case::VirtioMem, "resident_bytes 100", quiet(""), Some("no resident_bytes"));
        check(Case::SparseFile, "disk_bytes 4096", quiet("disk_bytes 8192"), None);
        check(Case::SparseFile, "disk_bytes 4096", quiet("disk_bytes 268435456"), Some("disk_bytes"));
        check(Case::Paused, "stop_ms 10", quiet("stop_ms 1010"), None);
        check(Case::Paused, "stop_ms 10", quiet("stop_ms 1020"), Some("stop_ms is 1020"));
        check(Case::Quit, "ended_ms 10", quiet("ended_ms 1020"), Some("ended_ms"));
    }

    #[test]
    fn what_does_not_fit_must_be_said() {
        check(Case::MemoryCgroup, "", seen("", "bounded by memory.max of /sys/fs/cgroup/harm"), None);
        check(Case::MemoryCgroup, "", seen("", ""), Some("nothing was said"));
        let said = "No space left in the file system of /run/full/memory";
        check(Case::FullTmpfs, "", seen("calls 1000", said), None);
        check(Case::FullTmpfs, "", seen("calls 1001", said), Some("calls is 1001"));
        check(Case::FullTmpfs, "", seen("calls 9", "ENOMEM"), Some("nothing was said"));
    }

    #[test]
    fn a_vmm_that_dies_or_hangs_with_premap_alone_is_harmed() {
        let killed = Seen::parse("alive 0\nexit 137\nbooted 0\n", "Killed").unwrap();
        check(Case::MemoryCgroup, "", killed, Some("ended with 137; without premap it lived"));
        let hung = || Seen::parse("alive 1\nbooted 0\nstop_ms 1\nresident_bytes 1\n", "").unwrap();
        check(Case::VirtioMem, "resident_bytes 1", hung(), Some("did not get to its end"));
        check(Case::Paused, "stop_ms 1", hung(), None);
    }

    #[test]
    fn calls_are_summed_over_all_runs_that_were_reported() {
        let run = |calls: u64| {
            format!("report {{\"event\":\"mapped\",\"report\":{{\"host\":{{\"calls\":{calls}}}}}}}\n")
        };
        let output = format!("alive 1\nbooted 1\n{}{}report {{\"event\":\"end", run(3), run(4));
        assert_eq!(Seen::parse(&output, "").unwrap().figures["calls"], 7);
        for wrong in ["booted 1\n", "alive 1\n", "alive 1\nbooted 1\nx\n", "alive 1\nbooted 1\nx y\n"] {
            assert!(Seen::parse(wrong, "").is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_script_knows_every_case() {
        for case in Case::all() {
            assert!(super::super::SCRIPT.contains(&format!("\n{})\n", case.name())), "{}", case.name());
        }
    }
}
