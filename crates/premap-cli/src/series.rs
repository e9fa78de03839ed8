//! What one way of doing it came to, over all rounds of a run.

use crate::first_touch::Outcome;
use crate::strategy::Strategy;

/// One figure of an outcome, such as [`Outcome::total_ns`].
pub(crate) type Figure = fn(&Outcome) -> u64;

/// The outcomes of one strategy, or of one profile, one of each round.
#[derive(Clone, Debug)]
pub(crate) struct Series<T = Outcome> {
    first: T,
    rest: Vec<T>,
}

/// Where the values of a figure lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    /// The middle one; of an even number the lower of the two in the middle, so that it is a value that was measured.
    pub(crate) median: u64,
    pub(crate) min: u64,
    pub(crate) max: u64,
}

impl<T> Series<T> {
    /// The first round.
    pub(crate) fn new(first: T) -> Self {
        Self { first, rest: Vec::new() }
    }

    /// Another round.
    pub(crate) fn push(&mut self, outcome: T) {
        self.rest.push(outcome);
    }

    /// The first round, for what is the same in all.
    pub(crate) fn first(&self) -> &T {
        &self.first
    }

    /// All rounds, the first one first.
    pub(crate) fn samples(&self) -> impl Iterator<Item = &T> {
        [&self.first].into_iter().chain(&self.rest)
    }

    /// The round of which `mapped` is least: it has what any round lost, if not all rounds lost alike.
    pub(crate) fn least_by(&self, mapped: impl Fn(&T) -> u64) -> &T {
        self.samples().min_by_key(|outcome| mapped(outcome)).unwrap_or(&self.first)
    }

    /// The middle of a figure, with its bounds.
    pub(crate) fn spread(&self, figure: impl Fn(&T) -> u64) -> Spread {
        let mut values: Vec<u64> = self.samples().map(figure).collect();
        values.sort_unstable();
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        Spread { median: at((values.len() - 1) / 2), min: at(0), max: at(values.len() - 1) }
    }

    /// The middle of a figure.
    pub(crate) fn median(&self, figure: impl Fn(&T) -> u64) -> u64 {
        self.spread(figure).median
    }
}

impl Series {
    pub(crate) fn strategy(&self) -> Strategy {
        self.first.strategy
    }

    /// The round that mapped least.
    pub(crate) fn least(&self) -> &Outcome {
        self.least_by(|outcome| outcome.report.host.mapped + outcome.report.second.mapped)
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
