//! `premap run`: each strategy on a fresh machine, and the comparison.

use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::Context;
use premap::Stage;
use premap::working_set::Identity;
use premap_guest::{Backing, Kernel, Memory};

use crate::backend::{self, Backend};
use crate::failure::{BadUse, tell};
use crate::first_touch::{Outcome, Setting, measure};
use crate::host_memory;
use crate::linux_guest::{Bootable, Guest};
use crate::mapping::Mapping;
use crate::options;
use crate::output::progress::Bar;
use crate::output::{json, table};
use crate::series::Series;
use crate::size::Size;
use crate::strategy::{Strategy, chosen};

/// What all outcomes of one run have in common.
pub(crate) struct Common {
    /// `kvm` or `soft`.
    pub(crate) backend: &'static str,
    /// The kernel's release, or the profile that the software KVM follows.
    pub(crate) kernel: String,
    pub(crate) guest: Guest,
    pub(crate) setting: Setting,
    /// How often each strategy was measured.
    pub(crate) rounds: u32,
}

/// Runs the strategies and prints what they cost.
pub(crate) fn run(options: &options::Run) -> anyhow::Result<ExitCode> {
    let machine = &options.machine;
    check(machine)?;
    if machine.linux.guest == Guest::Linux {
        let bootable = Bootable::new(machine)?;
        let mapping = mapping(options, || bootable.identity())?;
        return compare(&bootable.linux, options, |strategy, bar| bootable.measure(&mapping, strategy, bar));
    }
    let mapping = mapping(options, || setting(machine).identity())?;
    match backend::choose(machine.backend, machine.profile)? {
        Backend::Kvm(linux) => run_on(&linux, options, &mapping),
        Backend::Soft(soft) => run_on(&soft, options, &mapping),
    }
}

/// Refuses what can't be had, before anything is made.
pub(crate) fn check(machine: &options::Machine) -> anyhow::Result<()> {
    machine.linux.check()?;
    let touches = [("--touch", machine.touch.is_some()), ("--order", machine.order.is_some())];
    if let Some((flag, _)) = touches.iter().find(|(_, given)| *given && machine.linux.guest == Guest::Linux) {
        let why = format!("{flag}: Linux touches what it likes; leave it away, or --guest linux");
        return Err(BadUse(why).into());
    }
    let (memory, backing) = (machine.memory, machine.backing);
    let page = backing.page_size();
    if !memory.0.is_multiple_of(page.bytes()) {
        let memory = memory.flag();
        return Err(BadUse(format!(
            "--memory {memory}: {backing} comes in pages of {page}; give 2M or 512M"
        ))
        .into());
    }
    host_memory::check(memory, backing)?;
    if backing == Backing::Hugetlb {
        // Only an attempt tells whether the pool has as many pages as it promises.
        Memory::new(memory.0, backing).context("--backing hugetlb")?;
    }
    Ok(())
}

/// What the first-touch guest does, and on what.
pub(crate) fn setting(machine: &options::Machine) -> Setting {
    Setting {
        bytes: machine.memory.0,
        backing: machine.backing,
        access: machine.touch.unwrap_or_default().into(),
        order: machine.order.unwrap_or_default().into(),
        vcpus: machine.vcpus,
    }
}

fn mapping(options: &options::Run, image: impl FnOnce() -> Identity) -> anyhow::Result<Mapping> {
    let first = options.first.read(image)?;
    Ok(Mapping { chunk: options.chunk.map(|size| size.0), deadline: options.deadline, first })
}

fn run_on<K: Kernel>(kernel: &K, options: &options::Run, mapping: &Mapping) -> anyhow::Result<ExitCode> {
    let setting = setting(&options.machine);
    compare(kernel, options, |strategy, bar| measure(kernel, &setting, mapping, strategy, bar))
}

/// Measures each strategy asked for, once a round, and prints what they cost.
fn compare<K: Kernel>(
    kernel: &K,
    options: &options::Run,
    measure: impl Fn(Strategy, &Bar) -> anyhow::Result<Outcome>,
) -> anyhow::Result<ExitCode> {
    let setting = setting(&options.machine);
    let mut all: Vec<Series> = Vec::new();
    for _ in 0..options.repeat {
        for strategy in chosen(&options.strategy) {
            let bar = Bar::new(strategy, setting.bytes);
            let outcome = measure(strategy, &bar).with_context(|| strategy.name())?;
            match all.iter_mut().find(|series| series.strategy() == strategy) {
                Some(series) => series.push(outcome),
                None => all.push(Series::new(outcome)),
            }
        }
    }
    let (guest, rounds) = (options.machine.linux.guest, options.repeat);
    let common = Common { backend: K::NAME, kernel: kernel.release(), guest, setting, rounds };
    let text = if options.json { json::array(&common, &all)? } else { table::text(&common, &all) };
    stdout().lock().write_all(text.as_bytes()).context("writing to stdout")?;
    Ok(told_failures(&all))
}

/// Tells of memory that the kernel refused to map. What a deadline or a limit left is no failure.
fn told_failures(all: &[Series]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for series in all {
        let short = |outcome: &&Outcome| outcome.report.host.abandoned.max(outcome.report.second.abandoned);
        let limited = series.samples().filter(|outcome| outcome.report.limit.is_some()).max_by_key(short);
        if let Some((outcome, limit)) =
            limited.and_then(|outcome| Some((outcome, outcome.report.limit.as_ref()?)))
        {
            let (strategy, bytes) = (series.strategy().name(), Size(short(&outcome)));
            tell(format_args!(
                "{strategy}: {bytes} were left to the guest's faults, since they don't fit into {limit}"
            ));
        }
        for (stage, name) in [(Stage::Host, "host"), (Stage::Second, "second")] {
            let failed = |outcome: &&Outcome| match stage {
                Stage::Host => outcome.report.host.failed,
                Stage::Second => outcome.report.second.failed,
            };
            let Some(worst) = series.samples().max_by_key(failed).filter(|worst| failed(worst) > 0) else {
                continue;
            };
            let why = worst.shortfall(stage).map(|reason| reason.to_string()).unwrap_or_default();
            let (strategy, bytes) = (series.strategy().name(), Size(failed(&worst)));
            tell(format_args!("{strategy}: {bytes} failed at the {name} stage: {why}"));
            code = ExitCode::FAILURE;
        }
    }
    code
}
