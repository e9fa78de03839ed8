//! `--guest linux`: Linux booted on memory that was mapped by a strategy.

mod flags;

use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use premap::working_set::Identity;
use premap_guest::{Kernel, Linux};
use premap_kvm::probe;
use premap_linux_guest::{Boot, End, Image, LinuxMachine, MAX_VCPUS, Shape, Until};

use crate::backend::unopened;
use crate::failure::{BadUse, tell};
use crate::first_touch::Outcome;
use crate::mapping::{Mapping, explained};
use crate::options;
use crate::output::progress::Bar;
use crate::record::{Recorded, watch};
use crate::strategy::Strategy;

pub(crate) use flags::{Flags, Guest};

/// What boots, and on what.
pub(crate) struct Bootable {
    pub(crate) linux: Linux,
    image: Image,
    shape: Shape,
    until: Until,
    console: Option<PathBuf>,
}

impl Bootable {
    /// Opens the KVM and reads the files that the flags name.
    pub(crate) fn new(options: &options::Machine) -> anyhow::Result<Self> {
        let image = options.linux.image()?;
        let fits = image.fits(options.memory.0);
        fits.map_err(|error| BadUse(format!("--memory {}: {error}", options.memory.flag())))?;
        // As many again are spare where memory is mapped in the background.
        let most = MAX_VCPUS / 2;
        if options.vcpus > most {
            let vcpus = options.vcpus;
            return Err(BadUse(format!("--vcpus {vcpus}: the Linux guest has 1 to {most}")).into());
        }
        let shape =
            Shape { bytes: options.memory.0, backing: options.backing, vcpus: options.vcpus, spares: 0 };
        let linux = open(options.backend)?;
        let console = options.linux.console.clone();
        Ok(Self { linux, image, shape, until: options.linux.until(), console })
    }

    /// Makes a fresh machine with the image in its memory, and so many vCPUs that never run.
    fn machine(&self, spares: u32) -> anyhow::Result<LinuxMachine> {
        Ok(LinuxMachine::new(&self.linux, &self.image, &Shape { spares, ..self.shape })?)
    }

    /// Boots a machine up to where it is to run.
    fn boot(&self, machine: &mut LinuxMachine) -> anyhow::Result<Boot> {
        let boot = machine.boot(&self.until);
        // Whatever became of the boot: the console says most of why.
        let console = machine.console();
        if let Some(path) = &self.console {
            std::fs::write(path, &console).with_context(|| format!("--console {}", path.display()))?;
        }
        let last = console.lines().map(str::trim).rfind(|line| !line.is_empty());
        let last = last.map_or("its console is empty".to_owned(), |line| format!("its last line: {line}"));
        let boot = boot.map_err(|error| anyhow!("{error}; {last}"))?;
        let marker = self.until.marker.as_deref();
        match (boot.end, marker) {
            (End::Marker, _) | (End::PowerOff, None) => Ok(boot),
            (End::TimeLimit, _) => bail!(
                "the guest was not up after {:?}; give it longer by --time-limit; {last}",
                self.until.limit
            ),
            (end, Some(marker)) => {
                bail!("the guest {} before its console showed {marker:?}; {last}", ended(end))
            }
            (end, None) => bail!("the guest {} where it was to power off; {last}", ended(end)),
        }
    }

    /// What makes one boot's working set another's too.
    pub(crate) fn identity(&self) -> Identity {
        Identity(self.image.digest())
    }

    /// Records what a boot touches.
    pub(crate) fn record(&self) -> anyhow::Result<Recorded> {
        let mut machine = self.machine(0)?;
        let memory = machine.regions(premap::Touch::Write);
        watch(&memory, self.identity(), || {
            let boot = self.boot(&mut machine).map_err(|error| explained(error, &memory))?;
            Ok(boot.cost.faults)
        })
    }

    /// Measures one strategy.
    pub(crate) fn measure(
        &self,
        mapping: &Mapping,
        strategy: Strategy,
        bar: &Bar,
    ) -> anyhow::Result<Outcome> {
        let in_background = strategy == Strategy::Background;
        let mut machine = self.machine(if in_background { self.shape.vcpus } else { 0 })?;
        let regions = machine.regions(premap::Touch::Write);
        let spares = machine.take_spares();
        let mut lent = machine.lend();
        let vcpu = lent.vcpus.first_mut().context("a machine without a vCPU")?;
        let support = probe::pre_fault(&lent.vm, vcpu);
        let (report, boot) = if in_background {
            let background = mapping.engine(&lent.vm).background(mapping.plan(regions.clone())?, spares)?;
            bar.running();
            let boot = self.boot(&mut machine).map_err(|error| explained(error, &regions))?;
            (background.join()?, boot)
        } else {
            let report = mapping.map(strategy, &lent.vm, &mut lent.vcpus, regions.clone(), bar)?;
            bar.running();
            (report, self.boot(&mut machine).map_err(|error| explained(error, &regions))?)
        };
        Ok(Outcome {
            strategy,
            unsupported: (!support.is_supported()).then(|| support.to_string()),
            report,
            guest_ns: u64::try_from(boot.elapsed.as_nanos()).unwrap_or(u64::MAX),
            faults: boot.cost.faults,
            exits: boot.cost.exits,
            mapped: machine.mapped()?,
        })
    }
}

fn ended(end: End) -> &'static str {
    match end {
        End::Reset => "reset its machine",
        End::PowerOff => "powered off",
        End::Marker | End::TimeLimit => "ended",
    }
}

/// Opens `/dev/kvm`, whether it can pre-fault or not: the outcomes say what came of that.
fn open(asked: options::Backend) -> anyhow::Result<Linux> {
    if asked == options::Backend::Soft {
        return Err(BadUse(
            "--guest linux: the software KVM runs no processor's instructions; use --backend kvm".to_owned(),
        )
        .into());
    }
    let linux = Linux::open().map_err(|error| anyhow!("--guest linux: {}", unopened(&error)))?;
    if asked == options::Backend::Auto {
        tell(format_args!("on /dev/kvm, Linux {}", linux.release()));
    }
    Ok(linux)
}
