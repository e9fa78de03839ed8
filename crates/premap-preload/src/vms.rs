//! What is known of this process's VMs.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use premap::Stop;

use crate::kvm::{Counters, Role};
use crate::memory::Slot;
use crate::phase::{End, Entry, Root, Timing};
use crate::run_page::RunPage;
use crate::task::Mapped;

/// The VMs that are there.
#[derive(Debug, Default)]
pub(crate) struct Vms {
    made: u32,
    list: Vec<Vm>,
}

/// A VM as the VMM has made it so far.
#[derive(Debug)]
pub(crate) struct Vm {
    /// The process's VMs are numbered from 1.
    pub(crate) number: u32,
    /// Its descriptors: the first, and duplicates that were used.
    pub(crate) fds: Vec<RawFd>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) slots: BTreeMap<u32, Slot>,
    pub(crate) timing: Timing,
    /// Ends the run under way.
    pub(crate) stop: Stop,
    /// Whether a vCPU was called back from it.
    called_back: bool,
    /// What runs have mapped.
    pub(crate) mapped: Mapped,
    /// Counted by vCPUs that are closed by now.
    pub(crate) count: Count,
    /// vCPUs made, whether open or not.
    pub(crate) vcpus_made: usize,
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) fds: Vec<RawFd>,
    /// Whether it may be in the guest.
    pub(crate) entered: bool,
    pub(crate) root: Root,
    /// Open where somebody wants to know.
    pub(crate) counters: Option<Arc<Counters>>,
    /// While a run is under way.
    pub(crate) page: Option<Arc<RunPage>>,
}

/// What vCPUs counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) faults: Option<u64>,
    pub(crate) exits: Option<u64>,
}

impl Count {
    /// Reads a vCPU's counters.
    pub(crate) fn read(counters: &Counters) -> Self {
        counters.read().map_or_else(Self::default, |stats| Self {
            faults: stats.get("pf_taken"),
            exits: stats.get("exits"),
        })
    }

    /// The sum of what is known.
    pub(crate) fn plus(self, other: Self) -> Self {
        let sum = |a: Option<u64>, b: Option<u64>| a.map_or(b, |a| Some(a + b.unwrap_or(0)));
        Self { faults: sum(self.faults, other.faults), exits: sum(self.exits, other.exits) }
    }
}

impl Vms {
    /// Adds a VM, in place of one that had this descriptor and was closed unseen.
    pub(crate) fn add(&mut self, fd: RawFd, timing: Timing) {
        self.forget(fd);
        self.made += 1;
        self.list.push(Vm {
            number: self.made,
            fds: vec![fd],
            vcpus: Vec::new(),
            slots: BTreeMap::new(),
            timing,
            stop: Stop::new(),
            called_back: false,
            mapped: Mapped::default(),
            count: Count::default(),
            vcpus_made: 0,
        });
    }

    /// Adds a vCPU.
    pub(crate) fn add_vcpu(&mut self, vm: u32, fd: RawFd, counters: Option<Arc<Counters>>) {
        self.forget(fd);
        if let Some(vm) = self.numbered(vm) {
            vm.vcpus_made += 1;
            vm.vcpus.push(Vcpu { fds: vec![fd], entered: false, root: Root::Fresh, counters, page: None });
        }
    }

    /// Whether any VM's entries must be asked about.
    pub(crate) fn is_due(&self) -> bool {
        self.list.iter().any(|vm| vm.timing.is_due())
    }

    /// For how much longer a VM may have runs; zero where none may.
    pub(crate) fn needed(&self, now: Instant) -> Duration {
        self.list.iter().map(|vm| vm.timing.needed(now)).max().unwrap_or_default()
    }

    /// Stops every run under way.
    pub(crate) fn stop_all(&self) {
        self.list.iter().for_each(|vm| vm.stop.stop());
    }

    pub(crate) fn numbers(&self) -> Vec<u32> {
        self.list.iter().map(|vm| vm.number).collect()
    }

    pub(crate) fn numbered(&mut self, number: u32) -> Option<&mut Vm> {
        self.list.iter_mut().find(|vm| vm.number == number)
    }

    /// The VM that has this descriptor, as its own or as a vCPU's.
    pub(crate) fn of(&mut self, fd: RawFd, role: Role) -> Option<&mut Vm> {
        self.list.iter_mut().find(|vm| match role {
            Role::Vm => vm.fds.contains(&fd),
            Role::Vcpu => vm.vcpus.iter().any(|vcpu| vcpu.fds.contains(&fd)),
        })
    }

    /// A descriptor of each VM, or of each vCPU.
    pub(crate) fn fds(&self, role: Role) -> Vec<RawFd> {
        let vms = self.list.iter();
        match role {
            Role::Vm => vms.filter_map(|vm| vm.fds.first().copied()).collect(),
            Role::Vcpu => vms.flat_map(|vm| &vm.vcpus).filter_map(|vcpu| vcpu.fds.first().copied()).collect(),
        }
    }

    /// Notes that `copy` is the same open file as `fd`.
    pub(crate) fn alias(&mut self, fd: RawFd, copy: RawFd) {
        let vm = self.list.iter_mut().map(|vm| &mut vm.fds);
        if let Some(fds) = vm.into_iter().find(|fds| fds.contains(&fd)) {
            fds.push(copy);
            return;
        }
        let mut vcpus = self.list.iter_mut().flat_map(|vm| &mut vm.vcpus);
        if let Some(vcpu) = vcpus.find(|vcpu| vcpu.fds.contains(&fd)) {
            vcpu.fds.push(copy);
        }
    }

    /// Takes a descriptor away; gives the vCPU whose last one it was, with its VM's number.
    pub(crate) fn forget(&mut self, fd: RawFd) -> Option<(u32, Vcpu)> {
        for vm in &mut self.list {
            vm.fds.retain(|one| *one != fd);
            for vcpu in &mut vm.vcpus {
                vcpu.fds.retain(|one| *one != fd);
            }
            if let Some(at) = vm.vcpus.iter().position(|vcpu| vcpu.fds.is_empty()) {
                return Some((vm.number, vm.vcpus.swap_remove(at)));
            }
        }
        None
    }

    /// Takes out the VMs that have no descriptor left.
    pub(crate) fn take_closed(&mut self) -> Vec<Vm> {
        let is_open = |vm: &Vm| !vm.fds.is_empty() || !vm.vcpus.is_empty();
        let (open, closed) = std::mem::take(&mut self.list).into_iter().partition(is_open);
        self.list = open;
        closed
    }

    /// Takes all VMs out.
    pub(crate) fn take_all(&mut self) -> Vec<Vm> {
        std::mem::take(&mut self.list)
    }
}

impl Vm {
    /// Decides what a vCPU does that is about to enter the guest, and notes that it is let in.
    pub(crate) fn enter(&mut self, fd: RawFd, now: Instant) -> Entry {
        let mut vcpu = self.vcpus.iter_mut().find(|vcpu| vcpu.fds.contains(&fd));
        let root = vcpu.as_ref().map_or(Root::MayBeStale, |vcpu| vcpu.root);
        let entry = self.timing.enter(root, now);
        if let (Entry::Pass, Some(vcpu)) = (entry, &mut vcpu) {
            vcpu.entered = true;
            vcpu.root = Root::Fresh;
        }
        entry
    }

    /// The vCPUs that a run can have: the one about to enter, and all that never entered, unless their root may be stale.
    /// The others may be in the guest, where a call on them would wait.
    pub(crate) fn lend(&self, entering: RawFd) -> Vec<RawFd> {
        let first_run = self.timing.runs() <= 1;
        let others = self.vcpus.iter().filter(|vcpu| !vcpu.entered && !vcpu.fds.contains(&entering));
        // Before the first run nothing has made a root that could be stale.
        let others = others.filter(|vcpu| first_run || vcpu.root == Root::Fresh);
        std::iter::once(entering).chain(others.filter_map(|vcpu| vcpu.fds.first().copied())).collect()
    }

    /// Notes that a run begins.
    pub(crate) fn begin_run(&mut self) {
        (self.stop, self.called_back) = (Stop::new(), false);
        if self.timing.runs() <= 1 {
            // Whatever came before it, no vCPU has a root yet.
            self.vcpus.iter_mut().for_each(|vcpu| vcpu.root = Root::Fresh);
        }
    }

    /// Ends the run under way, since the VMM wants a vCPU back that waits for it.
    pub(crate) fn call_back(&mut self) {
        self.called_back = true;
        self.stop.stop();
    }

    /// Notes that the run has ended, and mapped so much that was not mapped before. Gives whether there are to be no more,
    /// since they got on too slowly.
    pub(crate) fn end_run(&mut self, gained: u64, now: Instant) -> bool {
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.page = None);
        let end = match (self.stop.is_stopped(), self.called_back) {
            (false, _) => End::Done,
            (true, true) => End::CalledBack { gained },
            (true, false) => End::Stopped,
        };
        self.timing.ended(end, now);
        matches!(end, End::CalledBack { .. }) && !self.timing.is_due()
    }

    /// The page that a vCPU shares with the VMM, while a run is under way.
    pub(crate) fn page(&self, fd: RawFd) -> Option<&Arc<RunPage>> {
        self.vcpus.iter().find(|vcpu| vcpu.fds.contains(&fd))?.page.as_ref()
    }

    /// Takes note of a slot that the kernel has accepted. Gives whether mappings may have gone or come.
    pub(crate) fn set(&mut self, slot: Slot) -> bool {
        let before = match slot.bytes {
            0 => self.slots.remove(&slot.slot),
            _ => self.slots.insert(slot.slot, slot),
        };
        let place = |slot: &Slot| (slot.gpa, slot.bytes, slot.host);
        let moved = before.is_none_or(|before| place(&before) != place(&slot));
        if moved {
            self.vcpus.iter_mut().for_each(|vcpu| vcpu.root = Root::MayBeStale);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::phase::{Change, End};

    fn vms() -> Vms {
        let mut vms = Vms::default();
        vms.add(10, Timing::never());
        vms.add_vcpu(1, 11, None);
        vms.add_vcpu(1, 12, None);
        vms
    }

    #[test]
    fn a_vm_is_there_until_its_last_descriptor_is_closed() {
        let mut vms = vms();
        vms.alias(10, 20);
        vms.alias(12, 22);
        assert_eq!(vms.of(20, Role::Vm).unwrap().number, 1);
        assert_eq!(vms.of(22, Role::Vcpu).unwrap().number, 1);
        for (fd, vcpu_gone) in [(10, false), (20, false), (12, false), (11, true)] {
            assert_eq!(vms.forget(fd).is_some(), vcpu_gone, "{fd}");
            assert!(vms.take_closed().is_empty(), "{fd}");
        }
        assert!(vms.forget(22).is_some());
        assert_eq!(vms.take_closed().len(), 1);
    }

    #[test]
    fn a_number_used_again_belongs_to_the_new_vm() {
        let mut vms = vms();
        vms.add(11, Timing::never());
        assert!(vms.of(11, Role::Vcpu).is_none());
        assert_eq!(vms.of(11, Role::Vm).unwrap().number, 2);
        assert_eq!(vms.fds(Role::Vcpu), [12]);
    }

    #[test]
    fn vcpus_that_may_be_in_the_guest_are_not_lent() {
        let mut vms = vms();
        vms.add_vcpu(1, 13, None);
        let vm = vms.numbered(1).unwrap();
        assert_eq!(vm.lend(11), [11, 12, 13]);
        assert_eq!(vm.enter(12, Instant::now()), Entry::Pass);
        assert_eq!(vm.lend(11), [11, 13]);
    }

    #[test]
    fn vcpus_that_never_entered_are_lent_again_unless_their_root_may_be_stale() {
        let mut vms = Vms::default();
        vms.add(10, Timing::new(Duration::from_secs(60)));
        vms.add_vcpu(1, 11, None);
        vms.add_vcpu(1, 12, None);
        let (vm, now) = (vms.numbered(1).unwrap(), Instant::now());
        let slot = Slot { slot: 0, flags: 0, gpa: 0, bytes: 4096, host: 8192 };
        vm.set(slot);
        for _ in 0..2 {
            assert_eq!(vm.enter(11, now), Entry::Map);
            vm.begin_run();
            assert_eq!(vm.lend(11), [11, 12]);
            vm.call_back();
            vm.end_run(0, now);
        }
        assert_eq!(vm.enter(11, now), Entry::Map);
        vm.set(Slot { slot: 1, ..slot });
        assert_eq!(vm.lend(11), [11]);
    }

    #[test]
    fn only_a_slot_that_moves_matters() {
        let mut vms = vms();
        let vm = vms.numbered(1).unwrap();
        let slot = Slot { slot: 0, flags: 0, gpa: 0, bytes: 4096, host: 8192 };
        assert!(vm.set(slot));
        assert!(!vm.set(Slot { flags: 1, ..slot }));
        assert!(vm.set(Slot { gpa: 4096, ..slot }));
        assert!(vm.set(Slot { bytes: 0, ..slot }));
        assert!(vm.slots.is_empty());
    }

    #[test]
    fn a_vcpu_maps_only_after_it_was_in_the_kernel_since_the_change() {
        let mut vms = Vms::default();
        vms.add(10, Timing::new(Duration::from_secs(60)));
        vms.add_vcpu(1, 11, None);
        vms.add_vcpu(1, 12, None);
        let (vm, now) = (vms.numbered(1).unwrap(), Instant::now());
        assert_eq!(vm.enter(11, now), Entry::Map);
        vm.timing.ended(End::Done, now);
        vm.timing.changing();
        vm.set(Slot { slot: 0, flags: 0, gpa: 0, bytes: 4096, host: 8192 });
        vm.timing.changed(Change::Slots, now);
        let entries = [12, 12, 12, 11, 11].map(|fd| vm.enter(fd, now));
        assert_eq!(entries, [Entry::Pass, Entry::Pass, Entry::Pass, Entry::Pass, Entry::Map]);
    }

    #[test]
    fn counts_add_up_and_what_is_unknown_stays_so() {
        let count = |faults| Count { faults, exits: None };
        assert_eq!(count(Some(3)).plus(count(Some(4))), count(Some(7)));
        assert_eq!(count(Some(3)).plus(count(None)), count(Some(3)));
        assert_eq!(count(None).plus(count(None)), count(None));
    }
}
