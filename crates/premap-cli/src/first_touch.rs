//! One measurement: a fresh machine and fresh memory, mapped by one strategy, and touched by the guest.
//!
//! What the guest itself is made of, code and page tables in a slot of its own, is mapped before anything is measured,
//! for every strategy alike: the counts are those of the memory measured. When the guest is done, every word is checked.

use std::thread;

use anyhow::{Context, ensure};
use premap::working_set::Identity;
use premap::{Engine, Plan, Reason, Region, Report, Stage};
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_guest::{
    Access, Backing, Kernel, Lent, Machine, MappedPages, Memory, Order, Run, SlotFlags, Touch, word_of,
};
use premap_kvm::probe;

use crate::mapping::{Mapping, explained};
use crate::output::account::shortfall;
use crate::output::progress::Bar;
use crate::record::{Recorded, watch};
use crate::strategy::Strategy;

/// Where the measured memory lies in the guest.
const BASE: Gpa = Gpa::new(4 << 30);

/// What is measured, whatever the strategy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) bytes: u64,
    pub(crate) backing: Backing,
    pub(crate) access: Access,
    pub(crate) order: Order,
    pub(crate) vcpus: u32,
}

impl Setting {
    /// What makes one run's working set another's too: what the guest does, in words.
    pub(crate) fn identity(&self) -> Identity {
        let order = match self.order {
            Order::Ascending => "ascending",
            Order::Random => "random",
        };
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(format!("first-touch {} {order}", self.access).bytes()) {
            *to = from;
        }
        Identity(bytes)
    }

    fn touch(&self) -> anyhow::Result<Touch> {
        let range = GpaRange::try_new(BASE, self.bytes)?;
        Ok(Touch { range, access: self.access, order: self.order })
    }
}

/// What a strategy cost, and what it brought.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) strategy: Strategy,
    /// The engine's report; all zero where nothing was mapped ahead.
    pub(crate) report: Report,
    /// Why the second stage can't be had on this KVM, if so.
    pub(crate) unsupported: Option<String>,
    pub(crate) guest_ns: u64,
    pub(crate) faults: u64,
    pub(crate) exits: u64,
    pub(crate) mapped: MappedPages,
}

impl Outcome {
    /// Mapping and running together; what is mapped in the background is mapped meanwhile.
    pub(crate) fn total_ns(&self) -> u64 {
        match self.strategy {
            Strategy::Background => self.guest_ns,
            _ => self.report.host.ns + self.report.second.ns + self.guest_ns,
        }
    }

    /// One of a strategy that cost and brought nothing.
    #[cfg(test)]
    pub(crate) fn of(strategy: Strategy) -> Self {
        Self {
            strategy,
            report: Report::default(),
            unsupported: None,
            guest_ns: 0,
            faults: 0,
            exits: 0,
            mapped: MappedPages::default(),
        }
    }

    /// Why a stage that the strategy has did not map everything, if so.
    pub(crate) fn shortfall(&self, stage: Stage) -> Option<Reason> {
        shortfall(&self.report, stage)
    }
}

/// Measures one strategy.
pub(crate) fn measure<K: Kernel>(
    kernel: &K,
    setting: &Setting,
    mapping: &Mapping,
    strategy: Strategy,
    bar: &Bar,
) -> anyhow::Result<Outcome> {
    let touch = setting.touch()?;
    let spares = if strategy == Strategy::Background { setting.vcpus } else { 0 };
    let mut machine = Machine::with_spares(kernel, setting.vcpus, spares)?;
    let memory = Memory::new(setting.bytes, setting.backing)?;
    let region = region(&touch, &memory);
    let slot = machine.slots().add(BASE, memory, SlotFlags::NONE)?;
    machine.map_own_memory(touch.range)?;

    let lent = machine.lend();
    let vcpu = lent.vcpus.first_mut().context("a machine without a vCPU")?;
    let support = probe::pre_fault(lent.vm, vcpu);
    let (report, run) = if strategy == Strategy::Background {
        bar.running();
        let plan = mapping.plan(vec![region])?;
        let mapped = map_meanwhile(mapping.engine(lent.vm), plan, lent, &touch);
        let (report, run) = mapped.map_err(|error| explained(error, &[region]))?;
        (report, Some(run))
    } else {
        (mapping.map(strategy, lent.vm, lent.vcpus, vec![region], bar)?, None)
    };
    bar.running();
    let run =
        run.map_or_else(|| machine.touch(&touch), Ok).map_err(|error| explained(error.into(), &[region]))?;
    let mapped = machine.mapped()?;
    let memory = machine.slot(slot).context("the slot is gone")?.memory();
    check_words(memory, setting.access, run.sum)?;
    Ok(Outcome {
        strategy,
        unsupported: (!support.is_supported()).then(|| support.to_string()),
        report,
        guest_ns: u64::try_from(run.elapsed.as_nanos()).unwrap_or(u64::MAX),
        faults: run.faults,
        exits: run.exits,
        mapped,
    })
}

/// Records what a run touches.
pub(crate) fn record<K: Kernel>(kernel: &K, setting: &Setting) -> anyhow::Result<Recorded> {
    let touch = setting.touch()?;
    let mut machine = Machine::new(kernel, setting.vcpus)?;
    let memory = Memory::new(setting.bytes, setting.backing)?;
    let region = region(&touch, &memory);
    machine.slots().add(BASE, memory, SlotFlags::NONE)?;
    machine.map_own_memory(touch.range)?;
    watch(&[region], setting.identity(), || {
        let run = machine.touch(&touch).map_err(|error| explained(error.into(), &[region]))?;
        Ok(run.faults)
    })
}

/// Lets the guest run from the start, and maps ahead of it on the spare vCPUs.
fn map_meanwhile<K: Kernel>(
    engine: Engine<'_>,
    plan: Plan,
    lent: Lent<'_, K>,
    touch: &Touch,
) -> anyhow::Result<(Report, Run)> {
    thread::scope(|scope| {
        let background = engine.background_scoped(scope, plan, lent.spares.iter_mut().collect())?;
        let run = touch.run(lent.vcpus)?;
        Ok((background.join()?, run))
    })
}

/// The memory as the engine sees it: populated as the guest will touch it.
fn region(touch: &Touch, memory: &Memory) -> Region {
    let populate = match touch.access {
        Access::Read => premap::Touch::Read,
        Access::Write => premap::Touch::Write,
    };
    memory.region(touch.range.start(), populate)
}

/// Compares what the guest left, or what it read, with what must be there.
fn check_words(memory: &Memory, access: Access, sum: u64) -> anyhow::Result<()> {
    let words = (0..memory.bytes() / PAGE_SIZE).map(|index| (index, memory.read_word(index * PAGE_SIZE)));
    match access {
        Access::Write => {
            for (index, word) in words {
                let expected = word_of(index);
                ensure!(
                    word == expected,
                    "page {index} holds {word:#x} where the guest wrote {expected:#x}: this KVM lost a write"
                );
            }
        }
        Access::Read => {
            let expected = words.fold(0, |sum: u64, (_, word)| sum.wrapping_add(word));
            ensure!(
                sum == expected,
                "the guest's words sum up to {sum:#x} and the host's to {expected:#x}: this KVM showed it other memory"
            );
        }
    }
    Ok(())
}
