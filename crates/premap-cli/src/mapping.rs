//! How memory is mapped before a guest runs, whatever the guest.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use premap::{Budget, Engine, Fate, Plan, Region, Report, Stage, Stages};
use premap_kvm::linux::Vcpu as NoVcpu;
use premap_kvm::{Vcpu, Vm};

use crate::output::progress::Bar;
use crate::size::Size;
use crate::strategy::Strategy;
use crate::working_set::First;

/// Adds to a guest's failure what of its memory the host does not give, if that may be the cause: the guest meets it as an
/// errno of KVM_RUN that says nothing of memory.
pub(crate) fn explained(error: anyhow::Error, regions: &[Region]) -> anyhow::Error {
    let Ok(plan) = Plan::new(regions.iter().copied()) else { return error };
    let mut engine = Engine::new().stages(Stages::Host).budget(Budget::within_host_memory());
    let Ok(report) = engine.run::<NoVcpu<OwnedFd>>(&plan, &mut []) else { return error };
    let failed = report.unmapped.iter().find(|lost| lost.reason.fate() == Fate::Failed);
    match failed.filter(|lost| lost.stage == Stage::Host) {
        Some(lost) => {
            let bytes = Size(report.host.failed);
            error.context(format!("{bytes} of the guest's memory can't be had: host stage: {}", lost.reason))
        }
        None => error,
    }
}

/// What the flags say of mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Unless it is the engine's choice.
    pub(crate) chunk: Option<u64>,
    pub(crate) deadline: Option<Duration>,
    /// What comes first, and how much at most.
    pub(crate) first: First,
}

impl Mapping {
    /// The plan for a machine's memory.
    pub(crate) fn plan(&self, regions: Vec<Region>) -> anyhow::Result<Plan> {
        let plan = Plan::new(self.first.order(regions)?)?;
        Ok(match self.chunk {
            Some(chunk) => plan.with_chunk(chunk)?,
            None => plan,
        })
    }

    /// An engine that runs within the limits, which count from now.
    pub(crate) fn engine<'a>(&self, vm: &'a dyn Vm) -> Engine<'a> {
        let deadline = self.deadline.and_then(|time| Instant::now().checked_add(time));
        Engine::new().vm(vm).budget(Budget {
            bytes: self.first.budget,
            deadline,
            host_memory: self.first.host_memory(),
        })
    }

    /// Maps a machine's memory by a strategy; one that maps nothing has a report of zeros.
    pub(crate) fn map<V: Vcpu + Send>(
        &self,
        strategy: Strategy,
        vm: &dyn Vm,
        vcpus: &mut [V],
        regions: Vec<Region>,
        bar: &Bar,
    ) -> anyhow::Result<Report> {
        let plan = self.plan(regions)?;
        let Some(stages) = strategy.stages() else { return Ok(Report::default()) };
        let mut engine = self.engine(vm).stages(stages).progress(|progress| bar.mapping(progress));
        Ok(engine.run(&plan, vcpus)?)
    }
}

#[cfg(test)]
mod tests {
    use premap::{Backing, Gpa, GpaRange, Hva, Touch};

    use super::*;

    #[test]
    fn a_guest_that_fails_for_want_of_memory_says_what_the_host_stage_says() {
        // Nothing is mapped there.
        let (range, host) = (GpaRange::new(Gpa::new(0), 4 << 20), Hva::new(1 << 20));
        let region = Region { range, host, backing: Backing::Anonymous, touch: Touch::Write };
        let told = |regions: &[Region]| {
            format!("{:#}", explained(anyhow::anyhow!("KVM_RUN failed: Bad address"), regions))
        };
        let with_cause = told(&[region]);
        assert!(
            with_cause.starts_with("4 MiB of the guest's memory can't be had: host stage: "),
            "{with_cause}"
        );
        assert!(with_cause.ends_with(": KVM_RUN failed: Bad address"), "{with_cause}");
        assert_eq!(told(&[]), "KVM_RUN failed: Bad address");
    }
}
