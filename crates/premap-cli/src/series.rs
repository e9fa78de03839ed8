//! What one strategy came to, over all rounds of a run.

use crate::first_touch::Outcome;
use crate::strategy::Strategy;

/// One figure of an outcome, such as [`Outcome::total_ns`].
pub(crate) type Figure = fn(&Outcome) -> u64;

/// The outcomes of one strategy, one of each round.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    first: Outcome,
    rest: Vec<Outcome>,
}

/// Where the values of a figure lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    /// The middle one; of an even number the lower of the two in the middle, so that it is a value that was measured.
    pub(crate) median: u64,
    pub(crate) min: u64,
    pub(crate) max: u64,
}

impl Series {
    /// The first round.
    pub(crate) fn new(first: Outcome) -> Self {
        Self { first, rest: Vec::new() }
    }

    /// Another round.
    pub(crate) fn push(&mut self, outcome: Outcome) {
        self.rest.push(outcome);
    }

    pub(crate) fn strategy(&self) -> Strategy {
        self.first.strategy
    }

    /// All rounds, the first one first.
    pub(crate) fn samples(&self) -> impl Iterator<Item = &Outcome> {
        [&self.first].into_iter().chain(&self.rest)
    }

    /// The round that mapped least: what was lost in any round is lost in this one, if not all rounds lost alike.
    pub(crate) fn least(&self) -> &Outcome {
        let mapped = |outcome: &&Outcome| outcome.report.host.mapped + outcome.report.second.mapped;
        self.samples().min_by_key(mapped).unwrap_or(&self.first)
    }

    /// The middle of a figure, with its bounds.
    pub(crate) fn spread(&self, figure: Figure) -> Spread {
        let mut values: Vec<u64> = self.samples().map(figure).collect();
        values.sort_unstable();
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        Spread { median: at((values.len() - 1) / 2), min: at(0), max: at(values.len() - 1) }
    }

    /// The middle of a figure.
    pub(crate) fn median(&self, figure: Figure) -> u64 {
        self.spread(figure).median
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_a_value_that_was_measured() {
        let faults = |values: &[u64]| {
            let mut all =
                values.iter().map(|faults| Outcome { faults: *faults, ..Outcome::of(Strategy::Demand) });
            let mut series = Series::new(all.next().unwrap());
            all.for_each(|outcome| series.push(outcome));
            let Spread { median, min, max } = series.spread(|outcome| outcome.faults);
            (median, min, max)
        };
        assert_eq!(faults(&[7]), (7, 7, 7));
        assert_eq!(faults(&[9, 1, 5]), (5, 1, 9));
        assert_eq!(faults(&[9, 1, 5, 7]), (5, 1, 9));
    }

    #[test]
    fn a_round_that_lost_memory_is_the_one_that_is_told() {
        let mut lost = Outcome::of(Strategy::TwoStage);
        lost.report.second.failed = 4096;
        let mut whole = Outcome::of(Strategy::TwoStage);
        whole.report.second.mapped = 4096;
        let mut series = Series::new(whole.clone());
        series.push(lost);
        series.push(whole);
        assert_eq!(series.least().report.second.failed, 4096);
    }
}
