//! One TD: launched, run, and what both cost.

use std::collections::BTreeMap;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use premap::Report;
use premap::td::{Launch, LaunchProgress, LaunchReport, Phase, Piece};
use premap_address::{GpaRange, PAGE_SIZE};
use premap_guest::{Acceptance, TdMachine};
use premap_softkvm::Profile;
use premap_tdx::hob::Ram;
use premap_tdx::{Digest, TdHob, Tdvf};

use super::Options;

/// What a TD came to.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) profile: Profile,
    pub(super) mrtd: Digest,
    pub(super) launch: LaunchReport,
    pub(super) acceptance: Acceptance,
    /// SEAMCALLs by name, VP.ENTER and what came before it alike.
    pub(super) seamcalls: BTreeMap<&'static str, u64>,
}

impl Outcome {
    /// Launches and runs a TD.
    pub(super) fn of(
        profile: Profile,
        options: &Options,
        tdvf: &Tdvf<'_>,
        hob: &TdHob,
        memory: &[GpaRange],
        ram: &Ram,
    ) -> anyhow::Result<Self> {
        let mut machine = TdMachine::new(profile, options.vcpus, memory)?;
        let bar = bar(profile);
        let mut launch = Launch::new(Piece::of_firmware(tdvf, hob), hob.gpa().raw())?
            .progress(|progress| show(&bar, *progress));
        if !options.no_premap {
            launch = launch.map_rest(ram.ranges().iter().copied());
        }
        let (vm, vcpus) = machine.lend();
        let launch = launch.run(vm, vcpus).context("the launch")?;
        let pages: u64 = ram.ranges().iter().map(|range| range.bytes() / PAGE_SIZE).sum();
        bar.set_message(format!("the guest accepts {pages} pages"));
        bar.tick();
        let acceptance = machine.accept(ram.ranges()).context("the guest")?;
        bar.finish_and_clear();
        let seamcalls =
            machine.host().seamcalls().iter().map(|(call, count)| (call.name(), count.calls)).collect();
        Ok(Self { profile, mrtd: machine.mrtd()?, launch, acceptance, seamcalls })
    }

    /// How long a phase took.
    pub(super) fn phase_ns(&self, phase: Phase) -> u64 {
        self.launch.phases.iter().filter(|report| report.phase == phase).map(|report| report.ns).sum()
    }

    /// How long the guest's ACCEPTs took.
    pub(super) fn accept_ns(&self) -> u64 {
        u64::try_from(self.acceptance.elapsed.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The phases that map in parallel, each with what became of its memory.
    pub(super) fn mapped(&self) -> [(Phase, &Report); 2] {
        [(Phase::Reserve, &self.launch.reserve), (Phase::MapRest, &self.launch.rest)]
    }

    /// Exits that the guest's ACCEPTs cost where nothing is mapped ahead: one for each page that it did not have from the
    /// launch on.
    pub(super) fn demand_exits(&self) -> u64 {
        self.acceptance.pages
    }
}

/// Draws to stderr, and only if that is a terminal.
fn bar(profile: Profile) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{prefix:11} {bar:40} {percent:>3} %  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(profile.name());
    bar
}

fn show(bar: &ProgressBar, progress: LaunchProgress) {
    bar.set_message(progress.phase.name());
    bar.set_length(progress.all);
    bar.set_position(progress.done);
}
