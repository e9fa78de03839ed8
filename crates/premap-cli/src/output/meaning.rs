//! What the figures mean, in sentences. Each is said only where the figures bear it out.

use premap::Stage;
use premap_guest::{Access, Backing};

use super::table::ratio;
use crate::first_touch::Outcome;
use crate::run::Common;
use crate::series::{Figure, Series};
use crate::size::{counted, thousands};
use crate::strategy::Strategy;

const FAULTS: Figure = |outcome| outcome.faults;

/// The sentences that hold for these outcomes.
pub(super) fn sentences(common: &Common, all: &[Series]) -> Vec<String> {
    let find = |strategy| all.iter().find(|series| series.strategy() == strategy);
    let (demand, two, second) =
        (find(Strategy::Demand), find(Strategy::TwoStage), find(Strategy::SecondOnly));
    let mut said = Vec::new();
    said.extend(all.iter().find_map(|series| unsupported(series.least())));
    said.extend(demand.and_then(emulated));
    if let (Some(demand), Some(two)) = (demand, two.filter(|two| two.least().unsupported.is_none())) {
        said.extend(gain(demand, two));
    }
    if let (Some(demand), Some(second)) = (demand, second) {
        said.extend(alone(common, demand, second));
    }
    said.extend(all.iter().filter_map(|series| shortfall(series.least())));
    said.extend(two.and_then(|two| no_huge_pages(common, two.least())));
    if common.backend == "soft" {
        said.push(
            "The counts are what that Linux would show. The times are this software's: compare them with each other \
             only."
                .to_owned(),
        );
    }
    said
}

fn unsupported(outcome: &Outcome) -> Option<String> {
    let why = outcome.unsupported.as_ref()?;
    Some(format!("There is no second stage here: {why}. The host stage is all that can be done."))
}

/// A KVM that takes no faults for its guests at all.
fn emulated(demand: &Series) -> Option<String> {
    (demand.median(FAULTS) == 0).then(|| {
        "This KVM took no fault even on demand: it emulates the guest's instructions, so only the times tell \
         something."
            .to_owned()
    })
}

fn gain(demand: &Series, two: &Series) -> Option<String> {
    let beside = |figure: Figure| ratio(two.median(figure), demand.median(figure)).unwrap_or_default();
    (two.median(FAULTS) < demand.median(FAULTS)).then(|| {
        format!(
            "Mapped at both stages before it ran, the guest took {} instead of {}. It ran in {} of demand's time, \
             and with the mapping itself in {}.",
            counted(two.median(FAULTS), "fault"),
            thousands(demand.median(FAULTS)),
            beside(|outcome| outcome.guest_ns),
            beside(Outcome::total_ns),
        )
    })
}

/// What the second stage alone came to: worse than nothing, or as good as both.
fn alone(common: &Common, demand: &Series, second: &Series) -> Option<String> {
    let writes = common.setting.access == Access::Write;
    let (on_demand, faults) = (demand.median(FAULTS), second.median(FAULTS));
    if writes && faults > on_demand + on_demand / 10 {
        let (behind, why) = match common.setting.backing {
            Backing::File => ("the file's page in the page cache", "copy"),
            _ => ("the shared zero page", "replace"),
        };
        let ratio = ratio(faults, on_demand).unwrap_or_default();
        return Some(format!(
            "second-only is a trap: pre-faulting is a read, so an untouched page is mapped to {behind}, read-only, and its \
             first write faults to {why} that: {ratio} of demand's faults. Populate the host's side by writing first, as \
             two-stage does."
        ));
    }
    (second.least().unsupported.is_none() && faults < on_demand / 10).then(|| {
        "second-only does as well here, since a read is enough to make such memory's pages the guest's own. Private memory \
         that the guest writes needs both stages."
            .to_owned()
    })
}

/// A stage that came to an end early, for another reason than that it is not to be had.
fn shortfall(outcome: &Outcome) -> Option<String> {
    let lost = |stage| outcome.shortfall(stage).map(|reason| (stage, reason));
    let (_, reason) =
        lost(Stage::Host).or_else(|| lost(Stage::Second).filter(|_| outcome.unsupported.is_none()))?;
    Some(format!("{} did not map everything: {reason}.", outcome.strategy.name()))
}

/// Huge pages that were asked for and not had.
fn no_huge_pages(common: &Common, two: &Outcome) -> Option<String> {
    let none = two.unsupported.is_none() && two.mapped.pages_2m == 0;
    (common.setting.backing == Backing::TransparentHuge && none).then(|| {
        "The host gave no huge page, so all this holds for pages of 4 KiB: `premap doctor` says whether transparent huge \
         pages are on."
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use premap_guest::{MappedPages, Order};

    use super::*;
    use crate::first_touch::Setting;
    use crate::linux_guest::Guest;

    fn common(access: Access) -> Common {
        let setting = Setting {
            bytes: 1 << 20,
            backing: Backing::Anonymous,
            access,
            order: Order::Ascending,
            vcpus: 1,
        };
        Common { backend: "kvm", kernel: "6.12.0".to_owned(), guest: Guest::FirstTouch, setting, rounds: 1 }
    }

    fn outcome(strategy: Strategy, faults: u64, guest_ns: u64) -> Outcome {
        Outcome { guest_ns, faults, exits: faults, ..Outcome::of(strategy) }
    }

    #[track_caller]
    fn check(access: Access, outcomes: &[Outcome], expected: &[&str]) {
        let series: Vec<_> = outcomes.iter().cloned().map(Series::new).collect();
        let said = sentences(&common(access), &series);
        assert_eq!(said.len(), expected.len(), "{said:#?}");
        for (said, expected) in said.iter().zip(expected) {
            assert!(said.contains(expected), "{said:?} does not say {expected:?}");
        }
    }

    #[test]
    fn gain_and_trap_are_told_where_the_figures_show_them() {
        let [demand, second, two] = [
            outcome(Strategy::Demand, 256, 1_000),
            outcome(Strategy::SecondOnly, 512, 2_000),
            outcome(Strategy::TwoStage, 0, 20),
        ];
        let all = [demand.clone(), second.clone(), two];
        check(Access::Write, &all, &["took 0 faults instead of 256. It ran in 0.020×", "trap"]);
        check(Access::Read, &[demand.clone(), second], &[]);
        check(Access::Write, &[demand.clone(), outcome(Strategy::SecondOnly, 256, 900)], &[]);
        check(Access::Write, std::slice::from_ref(&demand), &[]);
        check(Access::Read, &[demand, outcome(Strategy::SecondOnly, 0, 900)], &["does as well here"]);
    }

    #[test]
    fn huge_pages_that_were_not_had_are_told() {
        let thp = |pages_2m| {
            let mut common = common(Access::Write);
            common.setting.backing = Backing::TransparentHuge;
            let mapped = MappedPages { pages_2m, ..MappedPages::default() };
            sentences(&common, &[Series::new(Outcome { mapped, ..outcome(Strategy::TwoStage, 0, 1) })]).len()
        };
        assert_eq!((thp(0), thp(1)), (1, 0));
    }

    #[test]
    fn a_missing_second_stage_is_told_once() {
        let missing =
            |strategy| Outcome { unsupported: Some("no NPT".to_owned()), ..outcome(strategy, 0, 1_000) };
        let all = [missing(Strategy::Demand), missing(Strategy::TwoStage)];
        check(Access::Write, &all, &["no second stage here: no NPT", "emulates"]);
    }
}
