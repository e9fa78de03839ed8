//! The trial: a small guest on demand, and another one mapped at both stages, on the real `/dev/kvm`.

use premap_guest::{Access, Backing, Linux, Order};

use super::check::{Check, Status, TRIAL};
use crate::first_touch::{Outcome, Setting, measure};
use crate::mapping::Mapping;
use crate::output::progress::Bar;
use crate::size::{Size, thousands};
use crate::strategy::Strategy;
use crate::working_set::First;

const SETTING: Setting = Setting {
    bytes: 8 << 20,
    backing: Backing::Anonymous,
    access: Access::Write,
    order: Order::Ascending,
    vcpus: 1,
};

/// Runs the trial, if there is a KVM to run it on.
pub(super) fn check(linux: Option<&Linux>) -> Check {
    let Some(linux) = linux else {
        return Check::new(TRIAL, Status::Missing, "not tried, since /dev/kvm can't be opened");
    };
    let mapping = Mapping { chunk: Some(4 << 20), deadline: None, first: First::default() };
    let measure = |strategy| measure(linux, &SETTING, &mapping, strategy, &Bar::new(strategy, SETTING.bytes));
    match measure(Strategy::Demand).and_then(|demand| Ok((demand, measure(Strategy::TwoStage)?))) {
        Ok((demand, two)) => judge(&demand, &two),
        Err(error) => Check::new(TRIAL, Status::Missing, format!("{error:#}")),
    }
}

fn judge(demand: &Outcome, two: &Outcome) -> Check {
    let memory = Size(SETTING.bytes);
    if let Some(why) = &two.unsupported {
        let host = Size(two.report.host.mapped);
        let why = why.split("; ").next().unwrap_or_default();
        return Check::new(
            TRIAL,
            Status::Limited,
            format!("{host} of {memory} mapped at the host stage only: {why}"),
        );
    }
    if !two.report.is_complete() {
        let lost = two.report.unmapped.first().map(|lost| format!("{}: {}", lost.range, lost.reason));
        let mapped = Size(two.report.second.mapped);
        let lost = lost.unwrap_or_default();
        return Check::new(
            TRIAL,
            Status::Limited,
            format!("{mapped} of {memory} mapped at both stages; {lost}"),
        )
        .advise("see whether something else takes the memory or sends signals");
    }
    let result = format!(
        "{memory} mapped at both stages; the guest's writes took {} faults instead of {}",
        thousands(two.faults),
        thousands(demand.faults)
    );
    if two.faults <= demand.faults / 10 {
        Check::good(TRIAL, result)
    } else {
        Check::new(TRIAL, Status::Limited, result).advise(
            "something unmaps the guest's memory again: swapping, KSM, NUMA balancing or memory pressure",
        )
    }
}

#[cfg(test)]
mod tests {
    use premap::{Report, StageReport};
    use premap_guest::MappedPages;

    use super::*;

    fn outcome(strategy: Strategy, second: u64, faults: u64) -> Outcome {
        let stage = |mapped| StageReport { mapped, ..StageReport::default() };
        let asked = SETTING.bytes;
        let report = Report { asked, host: stage(asked), second: stage(second), ..Report::default() };
        let mapped = MappedPages::default();
        Outcome { strategy, report, unsupported: None, guest_ns: 1, faults, exits: faults, mapped }
    }

    #[track_caller]
    fn check(two: &Outcome, status: Status, result: &str) {
        let check = judge(&outcome(Strategy::Demand, 0, 2_048), two);
        assert_eq!(check.status, status, "{check:?}");
        assert!(check.result.contains(result), "{check:?}");
    }

    #[test]
    fn only_a_trial_that_saved_the_faults_is_good() {
        let bytes = SETTING.bytes;
        check(&outcome(Strategy::TwoStage, bytes, 0), Status::Good, "0 faults instead of 2,048");
        check(&outcome(Strategy::TwoStage, bytes, 2_048), Status::Limited, "2,048 faults instead of 2,048");
        check(&outcome(Strategy::TwoStage, 4 << 20, 1_024), Status::Limited, "4 MiB of 8 MiB");
        let shadow =
            Outcome { unsupported: Some("no NPT; load it".into()), ..outcome(Strategy::TwoStage, 0, 0) };
        check(&shadow, Status::Limited, "host stage only: no NPT");
    }
}
