//! The output of one `premap run --json`.

use serde::Deserialize;

/// What a strategy cost, as `premap run --json` tells it. Fields that nothing is expected of are left out.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Row {
    pub(super) strategy: String,
    pub(super) backing: String,
    pub(super) pages: u64,
    pub(super) vcpus: u64,
    pub(super) host: HostStage,
    pub(super) second: SecondStage,
    pub(super) guest: Guest,
    pub(super) total_ns: u64,
    /// Of the Linux guest alone.
    pub(super) boot_ns: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct HostStage {
    pub(super) ns: u64,
    pub(super) bytes: u64,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct SecondStage {
    pub(super) ns: u64,
    pub(super) bytes: u64,
    pub(super) supported: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Guest {
    pub(super) ns: u64,
    pub(super) faults: u64,
}

impl Row {
    /// The time spent on mapping memory ahead.
    pub(super) fn ahead_ns(&self) -> u64 {
        self.host.ns + self.second.ns
    }
}

/// What one command printed: a row a strategy.
#[derive(Debug)]
pub(crate) struct Run(pub(super) Vec<Row>);

impl Run {
    /// Reads the output of `premap run --json`.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map(Self).map_err(|error| format!("not the JSON of premap run: {error}"))
    }

    pub(super) fn row(&self, strategy: &str) -> Result<&Row, String> {
        self.0
            .iter()
            .find(|row| row.strategy == strategy)
            .ok_or_else(|| format!("there is no row {strategy}"))
    }

    /// Takes the shorter times of an earlier attempt at the same command.
    pub(crate) fn take_shorter_times(&mut self, earlier: &Self) {
        for row in &mut self.0 {
            let Ok(other) = earlier.row(&row.strategy) else { continue };
            row.host.ns = row.host.ns.min(other.host.ns);
            row.second.ns = row.second.ns.min(other.second.ns);
            row.guest.ns = row.guest.ns.min(other.guest.ns);
            row.total_ns = row.total_ns.min(other.total_ns);
            row.boot_ns = row.boot_ns.map(|ns| ns.min(other.boot_ns.unwrap_or(ns)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn times_are_the_shortest_of_all_attempts_and_counts_the_last() {
        let run = |host: u64, guest: u64, faults: u64| {
            let rows = json!([{
                "strategy": "two-stage", "backing": "anon", "pages": 1, "vcpus": 1, "host": {"ns": host, "bytes": 1},
                "second": {"ns": 1, "bytes": 1, "supported": true}, "guest": {"ns": guest, "faults": faults}, "total_ns": 1000,
            }]);
            Run::parse(rows.to_string().as_bytes()).unwrap()
        };
        let mut last = run(400, 200, 4);
        last.take_shorter_times(&run(450, 100, 3));
        let row = last.row("two-stage").unwrap();
        assert_eq!((row.host.ns, row.guest.ns, row.total_ns, row.guest.faults), (400, 100, 1000, 4));
    }

    #[test]
    fn other_output_is_refused_with_a_reason() {
        assert!(Run::parse(b"error: no KVM").unwrap_err().contains("JSON"));
        assert!(Run::parse(b"[{\"strategy\":\"demand\"}]").is_err());
    }
}
