//! What `premap td measure` prints: a table of the firmware's sections and the values, or JSON.

use std::fmt::Write;

use comfy_table::Table;
use premap_tdx::{Digest, Measurement, Order, PageAug, Rules, Section, TdHob, Tdvf};
use serde::Serialize;

use super::measure::Verdict;
use crate::output::{STYLE, wrap};
use crate::size::{Size, thousands};

/// All that was found.
pub(super) struct Report<'a> {
    pub(super) file: String,
    pub(super) tdvf: &'a Tdvf<'a>,
    pub(super) rules: Rules,
    pub(super) measurement: Measurement,
    pub(super) tried: &'a [(Rules, Measurement)],
    pub(super) expected: Option<Digest>,
    pub(super) verdict: Verdict,
    pub(super) hob: Option<(Size, TdHob)>,
}

#[derive(Serialize)]
struct Json {
    mrtd: String,
    order: &'static str,
    adds: u64,
    extends: u64,
    sections: Vec<JsonSection>,
    /// Every value that was looked at; `mrtd` is among them.
    tried: Vec<JsonTry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<JsonExpected>,
    #[serde(skip_serializing_if = "Option::is_none")]
    td_hob_sha384: Option<String>,
}

#[derive(Serialize)]
struct JsonSection {
    #[serde(rename = "type")]
    kind: String,
    gpa: u64,
    bytes: u64,
    measured: bool,
}

#[derive(Serialize)]
struct JsonTry {
    order: &'static str,
    /// Whether sections marked PAGE.AUG are added before the measurement ends, as VMMs do.
    page_aug_added: bool,
    mrtd: String,
}

#[derive(Serialize)]
struct JsonExpected {
    mrtd: String,
    fits: bool,
    /// The order that gives it, also where another was asked for.
    order: Option<&'static str>,
}

impl Report<'_> {
    /// One object, with a newline at its end.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        let json = Json {
            mrtd: self.measurement.mrtd.to_string(),
            order: self.rules.order.name(),
            adds: self.measurement.adds,
            extends: self.measurement.extends,
            sections: self.tdvf.sections().iter().map(section).collect(),
            tried: self.tried.iter().map(attempt).collect(),
            expected: self.expected.map(|mrtd| self.expectation(mrtd)),
            td_hob_sha384: self.hob.as_ref().map(|(_, hob)| hob.digest().to_string()),
        };
        let mut text = serde_json::to_string_pretty(&json)?;
        text.push('\n');
        Ok(text)
    }

    fn expectation(&self, mrtd: Digest) -> JsonExpected {
        let order = match self.verdict {
            Verdict::Fits => Some(self.rules.order),
            Verdict::FitsOther(rules) => Some(rules.order),
            Verdict::Measured | Verdict::Differs => None,
        };
        JsonExpected {
            mrtd: mrtd.to_string(),
            fits: self.verdict == Verdict::Fits,
            order: order.map(Order::name),
        }
    }

    /// The table and what follows from it.
    pub(super) fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(STYLE);
        table.set_header(["", "section", "guest memory", "size", "in the image", "part of the MRTD"]);
        for (index, section) in self.tdvf.sections().iter().enumerate() {
            table.add_row(self.row(index, section));
        }
        let offset = self.tdvf.offset();
        let mut text = format!("{}: TDVF metadata at {offset:#x}\n{table}\n\n", self.file);
        for (rules, measurement) in self.tried {
            let _ = writeln!(text, "MRTD, {rules}\n  {}", measurement.mrtd);
        }
        let (adds, extends) = (thousands(self.measurement.adds), thousands(self.measurement.extends));
        let _ = writeln!(text, "{adds} pages added, {extends} pieces of 256 bytes measured");
        if let Some((memory, hob)) = &self.hob {
            let _ = writeln!(text, "TD HOB for {memory}, SHA-384 (goes to RTMR 0)\n  {}", hob.digest());
        }
        if let Some(verdict) = self.verdict() {
            let _ = writeln!(text, "\n{}", wrap(&verdict, 0));
        }
        text
    }

    fn row(&self, index: usize, section: &Section<'_>) -> [String; 6] {
        let (memory, data) = (section.memory(), section.data());
        let image = if data.is_empty() {
            String::new()
        } else {
            let start = section.data_offset();
            format!("{:#x} + {:#x}", start, data.len())
        };
        let part = match (self.rules.loads(section), section.is_measured()) {
            (true, true) => "addresses and content",
            (true, false) => "addresses",
            (false, _) => "nothing (PAGE.AUG)",
        };
        [
            index.to_string(),
            section.kind().to_string(),
            format!("{:#x} to {:#x}", memory.start(), memory.end()),
            Size(memory.bytes()).to_string(),
            image,
            part.to_owned(),
        ]
    }

    fn verdict(&self) -> Option<String> {
        match self.verdict {
            Verdict::Measured => None,
            Verdict::Fits => Some(format!("The expected value is that of {}.", self.rules)),
            Verdict::FitsOther(rules) => Some(format!(
                "The expected value is not that of {}, but that of {rules}: the VMM does it that way. \
                 `--order auto` takes either.",
                self.rules
            )),
            Verdict::Differs => Some(
                "The expected value comes out in no order, so the TD was not built from these sections with this content. \
                 Where to look: is this the very file that the VMM loaded (another release, or another VARS file with \
                 measured variables)? Did the VMM add more than the firmware asks for (a kernel, a payload)? Did the value \
                 come from MRTD, not from an RTMR? `--events FILE` writes what was hashed, with the value every 2 MiB: the \
                 first `digest` line that differs from the list of the tool that made the other value bounds the \
                 difference."
                    .to_owned(),
            ),
        }
    }
}

fn section(section: &Section<'_>) -> JsonSection {
    JsonSection {
        kind: section.kind().to_string(),
        gpa: section.memory().start().raw(),
        bytes: section.memory().bytes(),
        measured: section.is_measured(),
    }
}

fn attempt((rules, measurement): &(Rules, Measurement)) -> JsonTry {
    JsonTry {
        order: rules.order.name(),
        page_aug_added: rules.page_aug == PageAug::Added,
        mrtd: measurement.mrtd.to_string(),
    }
}
