//! What scenarios have in common: a machine with memory, the plan over it, and checks that hold in every one.

use premap::{Engine, Fate, Gpa, GpaRange, Plan, Region, Report, Stage, Touch as HostTouch};
use premap_guest::{Access, Backing, Kernel, Machine, Memory, Order, Run, SlotFlags, SlotId, Touch, word_of};
use premap_kvm::Vm;

/// The size of a page.
pub const PAGE: u64 = 4096;
/// Where measured memory starts.
pub const BASE: Gpa = Gpa::new(4 << 30);

/// A range of whole pages, counted from [`BASE`].
#[must_use]
pub fn pages(first: u64, count: u64) -> GpaRange {
    GpaRange::new(BASE.wrapping_add(first * PAGE), count * PAGE)
}

/// A machine whose memory is one slot at [`BASE`].
pub struct Fixture<K: Kernel> {
    /// The machine.
    pub machine: Machine<K>,
    /// Its one slot.
    pub slot: SlotId,
}

impl<K: Kernel> Fixture<K> {
    /// Makes a machine with memory of so many pages.
    pub fn new(kernel: &K, vcpus: u32, count: u64, backing: Backing) -> Self {
        Self::with_flags(kernel, vcpus, count, backing, SlotFlags::NONE)
    }

    /// The same with flags on the slot.
    pub fn with_flags(kernel: &K, vcpus: u32, count: u64, backing: Backing, flags: SlotFlags) -> Self {
        Self::of(Machine::new(kernel, vcpus).expect("a machine can be made"), count, backing, flags)
    }

    /// Makes a machine with one vCPU for the guest and one that is never run.
    pub fn with_spare(kernel: &K, count: u64, backing: Backing) -> Self {
        let machine = Machine::with_spares(kernel, 1, 1).expect("a machine can be made");
        Self::of(machine, count, backing, SlotFlags::NONE)
    }

    fn of(mut machine: Machine<K>, count: u64, backing: Backing, flags: SlotFlags) -> Self {
        let memory = Memory::new(count * PAGE, backing).expect("the memory can be had");
        let slot = machine.slots().add(BASE, memory, flags).expect("the slot can be made");
        Self { machine, slot }
    }

    /// The machine's memory.
    pub fn memory(&self) -> &Memory {
        self.machine.slot(self.slot).expect("the fixture's slot is there").memory()
    }

    /// All of the machine's memory, as the engine wants it described.
    pub fn region(&self, touch: HostTouch) -> Region {
        self.memory().region(BASE, touch)
    }

    /// A plan of all of the machine's memory, to be written, in chunks of 1 MiB.
    pub fn plan(&self) -> Plan {
        plan([self.region(HostTouch::Write)])
    }

    /// Runs the engine on all vCPUs and checks that its report adds up.
    pub fn map(&mut self, engine: Engine<'_>, plan: &Plan) -> Report {
        map(&mut self.machine, engine, plan)
    }

    /// How many of the slot's pages KVM has logged as written since the last time.
    pub fn dirty(&self) -> u64 {
        let words =
            usize::try_from(self.memory().bytes() / PAGE / 64 + 1).expect("a slot's bitmap fits in memory");
        let mut bitmap = vec![0; words];
        // SAFETY: the bitmap has a bit for each page of the slot, rounded up to 64.
        #[expect(unsafe_code, reason = "KVM is not told how long the bitmap is")]
        unsafe { self.machine.vm().get_dirty_log(self.slot.number(), &mut bitmap) }.expect("the slot logs");
        bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Lets the guest write every page, and checks that it did.
    pub fn write_all(&mut self) -> Run {
        let run = self.machine.touch(&self.writes()).expect("the guest runs to its end");
        self.check_written();
        run
    }

    /// A write of every page.
    pub fn writes(&self) -> Touch {
        let count = self.memory().bytes() / PAGE;
        Touch { range: pages(0, count), access: Access::Write, order: Order::Ascending }
    }

    /// Checks that every page holds what the guest wrote.
    pub fn check_written(&self) {
        for page in 0..self.memory().bytes() / PAGE {
            assert_eq!(
                self.memory().read_word(page * PAGE),
                word_of(page),
                "page {page} after the guest wrote it"
            );
        }
    }

    /// Lets the guest read every page, and checks that it saw what the host sees.
    pub fn read_all(&mut self) -> Run {
        let count = self.memory().bytes() / PAGE;
        let touch = Touch { range: pages(0, count), access: Access::Read, order: Order::Random };
        let run = self.machine.touch(&touch).expect("the guest runs to its end");
        let words = (0..count).map(|page| self.memory().read_word(page * PAGE));
        assert_eq!(run.sum, words.fold(0, u64::wrapping_add), "guest and host see different content");
        run
    }
}

/// A plan in chunks of 1 MiB.
pub fn plan(regions: impl IntoIterator<Item = Region>) -> Plan {
    Plan::new(regions).and_then(|plan| plan.with_chunk(1 << 20)).expect("the regions are aligned")
}

/// Runs the engine on all of a machine's vCPUs and checks that its report adds up.
pub fn map<K: Kernel>(machine: &mut Machine<K>, engine: Engine<'_>, plan: &Plan) -> Report {
    let mut engine = engine;
    let lent = machine.lend();
    let report = engine.run(plan, lent.vcpus).expect("the run can begin");
    check_sums(&report, plan);
    report
}

/// Checks that each stage accounts for every byte of the plan, and lists what it did not map.
pub fn check_sums(report: &Report, plan: &Plan) {
    assert_eq!(report.asked, plan.bytes());
    for (stage, sums) in [(Stage::Host, report.host), (Stage::Second, report.second)] {
        assert_eq!(sums.bytes(), report.asked, "{stage:?} does not add up: {report:?}");
        for (fate, sum) in
            [(Fate::Skipped, sums.skipped), (Fate::Failed, sums.failed), (Fate::Abandoned, sums.abandoned)]
        {
            let listed =
                report.unmapped.iter().filter(|lost| lost.stage == stage && lost.reason.fate() == fate);
            assert_eq!(
                listed.map(|lost| lost.range.bytes()).sum::<u64>(),
                sum,
                "{stage:?} {fate:?}: {report:?}"
            );
        }
    }
}

/// What a stage did not map: ranges and reasons.
#[must_use]
pub fn lost(report: &Report, stage: Stage) -> Vec<(GpaRange, premap::Reason)> {
    let unmapped = report.unmapped.iter().filter(|lost| lost.stage == stage);
    unmapped.map(|lost| (lost.range, lost.reason)).collect()
}
