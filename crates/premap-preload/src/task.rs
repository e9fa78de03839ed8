//! One run, on the library's own thread: from the slots to the report.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use premap::{Budget, Engine, HostMemory, Plan, Region, Report, Stage, Stages, Stop};
use premap_address_space::Area;
use premap_exec_settings::{HotplugPools, Settings, Strategy, Voice};
use premap_kvm::linux;

use crate::account::{Account, Memory};
use crate::boot::{self, GuestMemory};
use crate::events::{Event, Journal};
use crate::given::{self, Backed, HandOver};
use crate::kvm::{self, Counters, Role};
use crate::memory::{self, Left, Slot};
use crate::say::say;
use crate::shortfall::{Cause, shortfalls, size};
use crate::vms::Count;

/// What a run is to do.
pub(crate) struct Task {
    pub(crate) settings: Arc<Settings>,
    pub(crate) vm: u32,
    pub(crate) run: u32,
    pub(crate) fd: RawFd,
    /// The vCPUs that are lent.
    pub(crate) vcpus: Vec<RawFd>,
    pub(crate) all_vcpus: Vec<RawFd>,
    pub(crate) counters: Vec<Arc<Counters>>,
    pub(crate) slots: Vec<Slot>,
    /// What earlier runs mapped.
    pub(crate) before: Mapped,
    pub(crate) stop: Stop,
}

/// What runs have mapped so far, and know of the VM.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mapped {
    /// What all of them did.
    pub(crate) account: Account,
    /// Where in this process memory lies that the guest may be given later, in ascending order; decided at the first entry.
    pools: Option<Vec<Range<u64>>>,
    /// Where all of the slots' memory lay then.
    at_first: Vec<Range<u64>>,
    /// How much memory was left since it came later.
    late: u64,
    /// How long runs held the guest back that were stopped, since one came to its end.
    held_ns: u64,
    /// The shortfalls that were told.
    told: Vec<Cause>,
    /// Where in this process the memory lies, in ascending order.
    populated: Vec<Range<u64>>,
    /// Whether the guest's addresses were mapped too. Otherwise a change of slots costs nothing that was mapped.
    second: bool,
}

/// The stages of a strategy, if it has any.
pub(crate) fn stages(strategy: Strategy) -> Option<Stages> {
    match strategy {
        Strategy::TwoStage => Some(Stages::Both),
        Strategy::HostOnly => Some(Stages::Host),
        Strategy::SecondOnly => Some(Stages::Second),
        Strategy::None => None,
    }
}

impl Task {
    /// Maps the slots' memory. What there is to tell is told once the guest is let in.
    ///
    /// # Errors
    /// Why nothing could be mapped.
    pub(crate) fn perform(self) -> Result<(Mapped, Notes), String> {
        let areas = premap_address_space::areas()
            .map_err(|error| format!("cannot read the address space, /proc/self/smaps: {error}"))?;
        let mut known = self.before.clone();
        let mut lines = Vec::new();
        if known.pools.is_none() {
            known.pools = Some(merged(self.pools(&areas, &mut lines)));
            known.at_first = merged(self.slots.iter().map(Slot::host_range).collect());
        }
        let late = self.late(&known.at_first);
        let late_bytes: u64 = late.iter().map(|range| range.end - range.start).sum();
        let is_news = std::mem::replace(&mut known.late, late_bytes) < late_bytes;
        if is_news {
            lines.push(self.is_left(late_bytes));
        }
        let pools = merged(known.pools.iter().flatten().cloned().chain(late).collect());
        let found = memory::find(self.slots.iter().copied(), &areas, &pools);
        let regions = memory::narrow(found.regions, |range| known.missing(range))
            .map_err(|errno| format!("cannot tell what memory is present, by /proc/self/pagemap: {errno}"))?;
        if regions.is_empty() && self.run > 1 && !is_news {
            return Ok((known, Notes { lines, ..Notes::default() }));
        }
        let faults = self.counters.iter().map(|counters| Count::read(counters)).reduce(Count::plus);
        let report = self.run(regions.clone())?;
        known.account = known.account.plus(&report);
        for (cause, words) in shortfalls(&report, &self.settings) {
            if !known.told.contains(&cause) {
                lines.push(format!("VM {}: {words}", self.vm));
                known.told.push(cause);
            }
        }
        let known = if self.stop.is_stopped() {
            known.held_ns += report.wall_ns;
            // The second stage may have been stopped before it began.
            let second = self.settings.strategy == Strategy::TwoStage && report.second.unsupported.is_none();
            known.and(reached(&regions, &report), second)
        } else {
            known.held_ns = 0;
            known.and(regions.iter().map(host_range).collect(), report.second.mapped > 0)
        };
        let run = MappedRun {
            left: found.left,
            faults: faults.unwrap_or_default().faults,
            report,
            slots: self.slots,
        };
        let (vm, number, vcpus) = (self.vm, self.run, self.vcpus.len());
        let aloud = self.settings.voice == Voice::Everything;
        Ok((known, Notes { vm, number, vcpus, run: Some(run), lines, aloud }))
    }

    /// Where memory lies that the guest may be given later.
    fn pools(&self, areas: &[Area], lines: &mut Vec<String>) -> Vec<Range<u64>> {
        if self.settings.hotplug_pools == HotplugPools::Map || !cfg!(target_arch = "x86_64") {
            return Vec::new();
        }
        let backed = self.slots.iter().map(|slot| Backed::of(*slot, areas)).collect();
        let pools = given::pools(backed, &self.hand_over(areas));
        let bytes: u64 = pools.iter().map(|slot| slot.bytes).sum();
        if bytes > 0 {
            lines.push(self.is_left(bytes));
        }
        pools.iter().map(Slot::host_range).collect()
    }

    /// Where memory lies that came after the first entry and may be a virtio-mem device's: its slot comes as a whole when the
    /// first of its blocks is plugged. Slots that are made anew over what was there before are none of these.
    fn late(&self, at_first: &[Range<u64>]) -> Vec<Range<u64>> {
        if self.settings.hotplug_pools == HotplugPools::Map || !cfg!(target_arch = "x86_64") {
            return Vec::new();
        }
        let late = self.slots.iter().filter(|slot| given::may_be_plugged(slot)).map(Slot::host_range);
        let is_new = |range: &Range<u64>| {
            !at_first.iter().any(|known| known.start <= range.start && known.end >= range.end)
        };
        merged(late.filter(is_new).collect())
    }

    fn is_left(&self, bytes: u64) -> String {
        format!(
            "VM {}: {} MiB that the guest may be given later (virtio-mem, DIMMs) are left; --hotplug-pools map maps \
             them too",
            self.vm,
            bytes >> 20
        )
    }

    fn hand_over(&self, areas: &[Area]) -> HandOver {
        let read = |fd: &RawFd| kvm::Registers::read(kvm::duplicate(*fd, Role::Vcpu).ok()?).ok();
        let registers: Vec<_> = self.vcpus.iter().filter_map(read).collect();
        boot::hand_over(&registers, &GuestMemory { slots: &self.slots, areas })
    }

    fn run(&self, regions: Vec<Region>) -> Result<Report, String> {
        let Some(stages) = stages(self.settings.strategy) else { return Ok(Report::default()) };
        let plan = Plan::new(regions).map_err(|error| error.to_string())?;
        let plan = match self.settings.chunk {
            Some(chunk) => plan.with_chunk(chunk).map_err(|error| error.to_string())?,
            None => plan,
        };
        let gone = |errno| format!("the VM's descriptors are gone: {errno}");
        let vm = linux::Vm::new(kvm::duplicate(self.fd, Role::Vm).map_err(gone)?);
        let mut vcpus = Vec::new();
        for fd in &self.vcpus {
            match kvm::duplicate(*fd, Role::Vcpu) {
                Ok(fd) => vcpus.push(linux::Vcpu::new(fd)),
                // The others will do, if there are any.
                Err(errno) if vcpus.is_empty() && self.vcpus.len() == 1 => return Err(gone(errno)),
                Err(_) => {}
            }
        }
        // A run that goes on where another was stopped has the rest of its time.
        let rest =
            self.settings.deadline_ns.map(|ns| Duration::from_nanos(ns.saturating_sub(self.before.held_ns)));
        let deadline = rest.and_then(|rest| Instant::now().checked_add(rest));
        let mut engine = Engine::new().vm(&vm).stages(stages).stop(&self.stop);
        engine = engine.budget(Budget { deadline, host_memory: self.host_memory(), ..Budget::default() });
        if let Some(threads) = self.settings.host_threads {
            engine = engine.host_threads(threads);
        }
        engine.run(&plan, &mut vcpus).map_err(|error| error.to_string())
    }

    /// A guest that does not fit as a whole gets nothing ahead but what the user allows: which part of it the guest needs
    /// can't be told from outside, and what is taken for the rest may be what kills the VMM.
    fn host_memory(&self) -> HostMemory {
        match self.settings.limit {
            None => HostMemory::Whole,
            // What earlier runs took is taken.
            Some(limit) => HostMemory::UpTo(limit.saturating_sub(self.before.bytes())),
        }
    }
}

/// What there is to tell of a run.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    vm: u32,
    number: u32,
    vcpus: usize,
    /// None where there was nothing new.
    run: Option<MappedRun>,
    lines: Vec<String>,
    /// Whether the user asked to hear it.
    aloud: bool,
}

#[derive(Debug)]
struct MappedRun {
    left: Vec<Left>,
    faults: Option<u64>,
    report: Report,
    slots: Vec<Slot>,
}

impl Notes {
    /// Tells it.
    pub(crate) fn tell(&self, journal: &Journal) {
        let Self { vm, number, vcpus, .. } = *self;
        self.lines.iter().for_each(|line| say(line));
        let Some(MappedRun { left, faults, report, slots }) = &self.run else { return };
        let memory = Memory::of(slots, left, report.asked);
        journal.write(&Event::Mapped {
            vm,
            run: number,
            vcpus,
            faults: *faults,
            memory,
            slots,
            left,
            report,
        });
        if self.aloud {
            say(&format!(
                "VM {vm}, run {number}: {} of {} present on the host, {} mapped in the guest, in {} ms",
                size(report.host.mapped),
                size(report.asked),
                size(report.second.mapped),
                report.wall_ns / 1_000_000
            ));
        }
    }
}

impl Mapped {
    pub(crate) fn bytes(&self) -> u64 {
        self.populated.iter().map(|range| range.end - range.start).sum()
    }

    /// What was mapped, with what another run has mapped.
    fn and(mut self, host: Vec<Range<u64>>, second: bool) -> Self {
        self.populated.extend(host);
        Self { populated: merged(self.populated), second, ..self }
    }

    /// The parts of a host range that another run has to map: of memory that was mapped before, what is present still,
    /// and of new memory, all.
    fn missing(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, premap_kvm::Errno> {
        let mut parts = Vec::new();
        let mut at = range.start;
        for known in self.populated.iter().filter(|known| known.end > range.start && known.start < range.end)
        {
            if known.start > at {
                parts.push(at..known.start);
            }
            let part = at.max(known.start)..range.end.min(known.end);
            at = part.end;
            if self.second {
                match premap_address_space::present(part.clone()) {
                    // It can't be told before Linux 6.7. There is no second stage then, but a run that was stopped early
                    // does not know.
                    Err(premap_kvm::Errno::NOTTY) => parts.push(part),
                    present => parts.extend(present?),
                }
            }
        }
        if at < range.end {
            parts.push(at..range.end);
        }
        Ok(parts)
    }
}

/// Where in this process memory lies that a stopped run got to at the host stage.
fn reached(regions: &[Region], report: &Report) -> Vec<Range<u64>> {
    let lost = report.unmapped.iter().filter(|lost| lost.stage == Stage::Host).map(|lost| lost.range);
    let mut lost: Vec<_> =
        lost.map(|range| range.start().raw()..range.start().raw() + range.bytes()).collect();
    lost.sort_by_key(|range| range.start);
    let mut reached = Vec::new();
    for region in regions {
        let (gpa, bytes, host) = (region.range.start().raw(), region.range.bytes(), region.host.raw());
        let mut at = gpa;
        for hole in lost.iter().filter(|hole| hole.start < gpa + bytes && hole.end > gpa) {
            if hole.start > at {
                reached.push(host + (at - gpa)..host + (hole.start - gpa));
            }
            at = at.max(hole.end);
        }
        if at < gpa + bytes {
            reached.push(host + (at - gpa)..host + bytes);
        }
    }
    reached
}

fn host_range(region: &Region) -> Range<u64> {
    region.host.raw()..region.host.raw() + region.range.bytes()
}

/// The ranges in ascending order, those that touch made one.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut().filter(|last| last.end >= range.start) {
            Some(last) => last.end = last.end.max(range.end),
            None => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        assert_eq!(merged(vec![4..6, 0..2, 2..3, 5..9, 12..13]), [0..3, 4..9, 12..13]);
    }

    #[test]
    fn new_memory_is_taken_whole_and_known_memory_only_for_the_second_stage() {
        let one = |range: Range<u64>| std::iter::once(range).collect::<Vec<_>>();
        assert_eq!(Mapped::default().missing(0x1000..0x5000).unwrap(), one(0x1000..0x5000));
        let host_only = Mapped { populated: one(0x2000..0x3000), ..Mapped::default() };
        assert_eq!(host_only.missing(0x1000..0x5000).unwrap(), [0x1000..0x2000, 0x3000..0x5000]);
        // Known memory that is not present any more is not made present again.
        let both = Mapped { populated: one(0x2000..0x3000), second: true, ..Mapped::default() };
        match both.missing(0x1000..0x5000) {
            Ok(parts) => assert_eq!(parts, [0x1000..0x2000, 0x3000..0x5000]),
            Err(errno) => eprintln!("skipped: this kernel has no PAGEMAP_SCAN: {errno}"),
        }
    }

    #[test]
    fn a_stopped_run_s_memory_is_known_as_far_as_it_got() {
        let gpa_range = |gpa, bytes| premap::GpaRange::new(premap::Gpa::new(gpa), bytes);
        let region = |gpa, host| Region {
            range: gpa_range(gpa, 0x8000),
            host: premap::Hva::new(host),
            backing: premap::Backing::Anonymous,
            touch: premap::Touch::Write,
        };
        let regions = [region(0x1_0000, 0x50_0000), region(0x2_0000, 0x30_0000)];
        let mut report = Report::default();
        let reason = premap::Reason::Stopped;
        for (stage, gpa, bytes) in [
            (Stage::Host, 0x1_2000, 0x1000),
            (Stage::Host, 0x1_6000, 0x2000),
            (Stage::Second, 0x2_0000, 0x8000),
        ] {
            report.unmapped.push(premap::Unmapped { stage, range: gpa_range(gpa, bytes), reason });
        }
        report.unmapped.push(premap::Unmapped {
            stage: Stage::Host,
            range: gpa_range(0x2_0000, 0x1000),
            reason,
        });
        assert_eq!(
            reached(&regions, &report),
            [0x50_0000..0x50_2000, 0x50_3000..0x50_6000, 0x30_1000..0x30_8000]
        );
    }

    #[test]
    fn what_runs_map_adds_up() {
        let mapped = Mapped::default().and(vec![4..6, 0..2], true).and(vec![2..4, 8..9], false);
        assert_eq!((mapped.populated, mapped.second), (vec![0..6, 8..9], false));
    }
}
