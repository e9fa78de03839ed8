//! How memory is mapped before a guest runs, whatever the guest.

use std::time::{Duration, Instant};

use premap::{Budget, Engine, Plan, Region, Report};
use premap_kvm::{Vcpu, Vm};

use crate::output::progress::Bar;
use crate::strategy::Strategy;
use crate::working_set::First;

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
