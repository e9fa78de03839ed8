//! `KVM_PRE_FAULT_MEMORY`: maps a range as reads by the guest would.
//!
//! **The core rule.** After any progress it gives success with the range advanced; an error only where nothing was done, and
//! then the range is unchanged. Each step advances to the end of the mapping that covers the range's start, which may be
//! huge and begin before it or reach past its end.
//!
//! **In batches.** KVM maps a page a step. Here a step asks the host once for up to [`WINDOW`] pages and fills each leaf
//! table under one taking of its lock, which a VMM can't tell apart except by the clock. Between two steps, and in every
//! turn of a loop that waits for something, pending signals are looked at.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use premap_address::{Gfn, Gpa, GpaRange, Hva, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::abi::kvm_pre_fault_memory;

use super::SoftVcpu;
use crate::host::{Failure, State, Touch};
use crate::invalidation::Sequence;
use crate::loaded::Loaded;
use crate::machine::Machine;
use crate::memslots::{AddressSpace, Slot, Snapshot, State as SlotState};
use crate::private::{Kind, PrivateMemory};
use crate::profile::{Building, DeadVm, DyingSlot, StaleRoot};
use crate::second_stage::{Answer, Purpose};
use crate::signals::{self, Held};
use crate::tdx::{SHARED_BIT, Td};

/// Pages that the host is asked about at once: 16 MiB.
const WINDOW: u64 = 4096;
/// Pages that the host makes present at once: 2 MiB. It can take long, and a signal waits for it.
const POPULATE: u64 = 512;

/// What a step came to.
enum Step {
    /// So many pages are mapped.
    Done(u64),
    /// Something is in the way, perhaps not for long.
    Retry,
}

impl SoftVcpu {
    pub(super) fn pre_fault(&mut self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        self.machine.check_alive()?;
        if range.flags != 0 {
            return Err(Errno::INVAL);
        }
        let wanted = GpaRange::try_new(Gpa::new(range.gpa), range.size).map_err(|_| Errno::INVAL)?;

        if let Some(td) = &self.machine.td
            && !td.is_runnable()
            && self.machine.rules().building != Building::Reserved
        {
            return Err(Errno::OPNOTSUPP);
        }
        if self.machine.td.is_some() && wanted.end().raw() > 1 << SHARED_BIT {
            // An alias: the shared bit is not part of what is asked for. 6.16, 8046d29dde17.
            return Err(Errno::INVAL);
        }
        let signals = Held::new();
        let machine = Arc::clone(&self.machine);
        let _reading = machine.slots.enter();
        let mut rest = Some(wanted);
        let mut result = Ok(());
        while let Some(range) = rest {
            match self.pre_fault_step(range, &signals) {
                Ok(pages) => {
                    rest = range.bytes().checked_sub(pages * PAGE_SIZE).and_then(|bytes| {
                        GpaRange::try_new(range.start().wrapping_add(pages * PAGE_SIZE), bytes).ok()
                    });
                }
                Err(errno) => {
                    result = Err(errno);
                    break;
                }
            }
        }
        let left = rest.map_or(0, GpaRange::bytes);
        if left == wanted.bytes() {
            return result;
        }
        range.gpa = wanted.end().raw().wrapping_sub(left);
        range.size = left;
        Ok(())
    }

    /// Maps pages from the range's start on; returns how many, at least one.
    fn pre_fault_step(&mut self, range: GpaRange, signals: &Held) -> Result<u64, Errno> {
        let machine = Arc::clone(&self.machine);
        loop {
            if signals.pending() {
                return Err(Errno::INTR);
            }
            let key = machine.pre_fault_key(self.mode, self.told)?;
            if machine.rules().dead_vm == DeadVm::SeenInLoop && machine.is_dead() {
                return Err(Errno::IO);
            }
            if machine.rules().stale_root == StaleRoot::Replaced {
                self.roots.let_go_of_obsolete();
            }
            let root = if key == self.roots.key() { self.load_root()? } else { machine.load(key)? };
            match self.map_from(&machine, &root, key.role.space, range, signals)? {
                Step::Done(pages) => return Ok(pages),
                Step::Retry => thread::yield_now(),
            }
        }
    }

    fn map_from(
        &mut self,
        machine: &Machine,
        root: &Loaded,
        space: AddressSpace,
        range: GpaRange,
        signals: &Held,
    ) -> Result<Step, Errno> {
        let gfn = range.start().frame();
        let slots = machine.slots.current();
        let sequence = machine.invalidations.snapshot();
        let (kind, alike) = machine.kind_of(gfn, range.pages().min(WINDOW));
        let Some(slot) = slots.find(space, gfn) else {
            if kind == Kind::Private {
                return self.exit_for(gfn, kind, Errno::FAULT);
            }
            return self.no_slot(machine, root, &slots, range.start());
        };
        if slot.state == SlotState::Dying {
            return match machine.rules().dying_slot {
                DyingSlot::Spins => Ok(Step::Retry),
                DyingSlot::TryAgain => Err(Errno::AGAIN),
            };
        }
        // A step on a root that was invalidated maps nothing: of the host it gets KVM's one page, and no more.
        let most = if root.is_obsolete() { 1 } else { alike };
        let mut window = most.min(slot.end().number() - gfn.number());
        if let (Some(td), Kind::Private) = (&machine.td, kind) {
            return self.map_td_pages(machine, td, slot, gfn..Gfn::new(gfn.number() + window), sequence);
        }
        if kind == Kind::Private {
            let (run, _held) = self.get_private(slot, gfn, window.min(POPULATE))?;
            self.runs.clear();
            self.runs.push(run);
            return self.map_present(machine, root, slot, gfn, window, sequence);
        }
        loop {
            let hva = slot.hva(gfn);
            let memory = hva..hva.wrapping_add(window * PAGE_SIZE);
            machine.host.query(memory, machine.exclusivity(), &mut self.runs)?;
            let first = self.runs.first().ok_or(Errno::FAULT)?;
            match first.state {
                State::NoAccess => return Err(Errno::FAULT),
                State::Readable | State::Writable => {
                    return self.map_present(machine, root, slot, gfn, window, sequence);
                }
                State::Absent => window = first.pages.min(window).min(POPULATE),
            }
            match self.get_pages(hva, window, signals) {
                Ok(()) => {}
                Err(Failure::Again) => return Ok(Step::Retry),
                Err(Failure::BadAddress) => return Err(Errno::FAULT),
                Err(Failure::Interrupted) => return Err(Errno::INTR),
                Err(Failure::Poisoned) => {
                    // KVM sends the signal and tries again; the signal then ends the call.
                    signals::raise_poisoned(hva);
                    return Err(Errno::INTR);
                }
            }
        }
    }

    /// Maps private pages of a TD: sets memory aside for them while it is built, and gives it to the TD once it runs.
    fn map_td_pages(
        &mut self,
        machine: &Machine,
        td: &Td,
        slot: &Slot,
        pages: Range<Gfn>,
        sequence: Sequence,
    ) -> Result<Step, Errno> {
        let gfn = pages.start;
        if slot.private.as_ref().is_none_or(PrivateMemory::is_closed) {
            return self.exit_for(gfn, Kind::Private, Errno::FAULT);
        }
        let count = pages.end.number() - gfn.number();
        let valid = || machine.invalidations.allows(sequence, &pages);
        let done = match (td.is_runnable(), machine.rules().building) {
            (true, Building::Combined) => return Err(Errno::OPNOTSUPP),
            (true, _) => td.augment(gfn, count, valid)?,
            (false, _) => td.reserve(gfn, count, valid)?,
        };
        Ok(if done == 0 { Step::Retry } else { Step::Done(done) })
    }

    /// Nothing there: a mapping says so from now on, where the processor can address it at all.
    fn no_slot(
        &mut self,
        machine: &Machine,
        root: &Loaded,
        slots: &Snapshot,
        gpa: Gpa,
    ) -> Result<Step, Errno> {
        if gpa < machine.gpa_end() {
            if root.is_obsolete() {
                return Ok(Step::Retry);
            }
            root.mmio().note(gpa.frame(), gpa.frame(), slots.generation);
            self.counters.pf_mmio_spte_created += 1;
        }
        Err(Errno::NOENT)
    }

    /// Maps the pages that the host has present from `gfn` on, at most `pages`, as its last answer says.
    fn map_present(
        &self,
        machine: &Machine,
        root: &Loaded,
        slot: &Slot,
        gfn: Gfn,
        pages: u64,
        sequence: Sequence,
    ) -> Result<Step, Errno> {
        let mut done = 0;
        for run in &self.runs {
            if done >= pages || !matches!(run.state, State::Readable | State::Writable) {
                break;
            }
            let at = Gfn::new(gfn.number() + done);
            let answer = Answer { gfn: at, run: *run, sequence };
            let progress = machine.map(root, slot, at, pages - done, answer, Purpose::PreFault)?;
            done += progress.pages;
            if progress.pages < run.pages {
                break;
            }
        }
        Ok(if done == 0 { Step::Retry } else { Step::Done(done) })
    }

    /// Makes pages present as a read would: all of them, or where that fails, the first alone.
    fn get_pages(&mut self, hva: Hva, pages: u64, signals: &Held) -> Result<(), Failure> {
        let mut get = |pages| {
            let range = hva..hva.wrapping_add(pages * PAGE_SIZE);
            self.getter.populate(range, Touch::Read, || signals.pending())
        };
        match get(pages) {
            Err(Failure::BadAddress | Failure::Poisoned) if pages > 1 => get(1),
            result => result,
        }
    }
}
