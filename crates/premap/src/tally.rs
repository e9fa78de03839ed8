//! A worker's own account of what it did, merged into the report at the end.

use premap_address::GpaRange;

use crate::plan::Chunk;
use crate::report::{Reason, Report, Stage, StageReport, Unmapped};

/// A chunk and its region's place in the plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbered {
    pub(crate) place: u64,
    pub(crate) chunk: Chunk,
}

/// What one worker did at both stages. Workers share none of it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    stages: [StageReport; 2],
    lost: Vec<(u64, Unmapped)>,
    /// The limit on memory for which some was lost.
    pub(crate) limit: Option<String>,
}

impl Tally {
    pub(crate) fn mapped(&mut self, stage: Stage, bytes: u64) {
        self.stages[stage as usize].mapped += bytes;
    }

    pub(crate) fn called(&mut self, stage: Stage) {
        self.stages[stage as usize].calls += 1;
    }

    /// Notes that a range of the region at `place` was not mapped.
    pub(crate) fn lost(&mut self, place: u64, stage: Stage, range: GpaRange, reason: Reason) {
        self.stages[stage as usize].lose(range.bytes(), reason);
        let lost = Unmapped { stage, range, reason };
        let last = self.lost.last_mut().filter(|(last_place, _)| *last_place == place);
        if !last.is_some_and(|(_, last)| last.absorb(&lost)) {
            self.lost.push((place, lost));
        }
    }

    /// All bytes of a stage that are accounted for.
    pub(crate) fn bytes(&self, stage: Stage) -> u64 {
        self.stages[stage as usize].bytes()
    }

    /// Takes another worker's account in.
    pub(crate) fn merge(&mut self, other: Self) {
        for (ours, theirs) in self.stages.iter_mut().zip(other.stages) {
            ours.mapped += theirs.mapped;
            ours.skipped += theirs.skipped;
            ours.failed += theirs.failed;
            ours.abandoned += theirs.abandoned;
            ours.calls += theirs.calls;
            ours.unsupported = ours.unsupported.or(theirs.unsupported);
        }
        self.lost.extend(other.lost);
        self.limit = self.limit.take().or(other.limit);
    }

    /// Writes the account into a report: by stage, and then in the plan's order.
    pub(crate) fn write(mut self, report: &mut Report) {
        [report.host, report.second] = self.stages;
        report.limit = self.limit.take();
        self.lost.sort_by_key(|(place, lost)| (lost.stage, *place, lost.range.start()));
        for (_, lost) in self.lost {
            if !report.unmapped.last_mut().is_some_and(|last| last.absorb(&lost)) {
                report.unmapped.push(lost);
            }
        }
    }
}
