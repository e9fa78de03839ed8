//! How memory is mapped before a guest runs, whatever the guest.

use std::time::{Duration, Instant};

use premap::{Budget, Engine, Plan, Region, Report};
use premap_kvm::{Vcpu, Vm};

use crate::output::progress::Bar;
use crate::strategy::Strategy;

/// What the flags say of mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) chunk: u64,
    pub(crate) deadline: Option<Duration>,
}

impl Mapping {
    /// Maps `regions` by a strategy; one that maps nothing has a report of zeros.
    pub(crate) fn map<V: Vcpu + Send>(
        &self,
        strategy: Strategy,
        vm: &dyn Vm,
        vcpus: &mut [V],
        regions: Vec<Region>,
        bar: &Bar,
    ) -> anyhow::Result<Report> {
        let Some(stages) = strategy.stages() else { return Ok(Report::default()) };
        let plan = Plan::new(regions)?.with_chunk(self.chunk)?;
        let deadline = self.deadline.and_then(|time| Instant::now().checked_add(time));
        let engine = Engine::new().vm(vm).stages(stages).progress(|progress| bar.mapping(progress));
        Ok(engine.budget(Budget { bytes: None, deadline }).run(&plan, vcpus)?)
    }
}
