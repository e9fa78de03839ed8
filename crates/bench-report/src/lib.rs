//! What the workspace's benchmarks print: a line for each subject, as text or as one array of JSON.

use std::fmt;

use serde::Serialize;

/// What one subject came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// What is measured.
    pub bench: &'static str,
    /// `premap`, a peer, or a floor.
    pub subject: &'static str,
    /// How many threads were at work.
    pub threads: usize,
    /// The samples' median.
    pub value: f64,
    /// Of the value, as `ns/page` or `MB/s`.
    pub unit: &'static str,
    /// How far the samples lie apart: (max - min) / value.
    pub spread: f64,
}

impl Line {
    /// Makes a line of samples in its unit.
    ///
    /// # Panics
    /// Without a sample.
    #[must_use]
    pub fn new(
        (bench, subject): (&'static str, &'static str),
        threads: usize,
        unit: &'static str,
        mut samples: Vec<f64>,
    ) -> Self {
        samples.sort_by(f64::total_cmp);
        let value = samples[samples.len() / 2];
        let spread = (samples[samples.len() - 1] - samples[0]) / value;
        Self { bench, subject, threads, value, unit, spread }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bench, subject, threads, value, unit, spread } = self;
        write!(f, "{bench:11} {threads} threads  {subject:16} {value:10.1} {unit:9} spread {spread:.2}")
    }
}

/// Whether this program was told `--json`.
#[must_use]
pub fn wants_json() -> bool {
    std::env::args().any(|argument| argument == "--json")
}

/// The number behind `flag` on this program's command line.
///
/// # Panics
/// Where it is no number: there is nobody to tell but who runs the benchmark.
#[must_use]
pub fn flag(flag: &str, default: usize) -> usize {
    let value = std::env::args().skip_while(|argument| argument != flag).nth(1);
    value.map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{flag} {value}: not a number")))
}

/// The lines as one array of JSON.
///
/// # Errors
/// None, as a line is plain data.
pub fn json(lines: &[Line]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_median_and_the_spread_of_its_samples() {
        let line = Line::new(("bench", "premap"), 2, "us", vec![4.0, 2.0, 8.0]);
        let json: serde_json::Value = serde_json::from_str(&json(&[line]).unwrap()).unwrap();
        let expected = serde_json::json!([
            {"bench": "bench", "subject": "premap", "threads": 2, "value": 4.0, "unit": "us", "spread": 1.5}
        ]);
        assert_eq!(json, expected);
    }
}
