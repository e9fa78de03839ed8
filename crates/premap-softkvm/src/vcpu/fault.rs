//! A guest's fault: from the exit to the mapping that lets the instruction go on.
//!
//! As Linux does it (`kvm_mmu_page_fault`, `kvm_tdp_mmu_page_fault`, and `FNAME(page_fault)` where tables are shadowed):
//!
//! 1. Take the invalidation sequence. Where tables are shadowed, walk them: that tells the page that is needed, or that
//!    the fault is the guest's own.
//! 2. See whether the page is private, and find its slot. None: the access is emulated, and an MMIO mapping remembers that;
//!    a private one goes back to the VMM. Dying: try again.
//! 3. Ask the host for the page, or the guest_memfd for a private one, and make it present if it is not.
//! 4. Where a write meets a page that must be copied first (the zero page, the page cache, a page shared by fork), the
//!    copy replaces a page that may be mapped: an invalidation, which makes this very fault's answer stale. The guest
//!    faults again, and the second fault maps the copy. This is why memory that was pre-faulted but never written costs two
//!    faults a page.
//! 5. A write to a table that is shadowed is done here, for the shadow to learn of it.
//! 6. Else map it, if the sequence still holds, under the lock of the leaf table or of the shadow pages.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use premap_address::{Gfn, Gpa};
use premap_kvm::Errno;
use premap_mmu::shadow::{Demand, guest_frame};
use premap_mmu::{Access, Permissions};

use super::SoftVcpu;
use crate::access::Operation;
use crate::host::Touch;
use crate::loaded::{Loaded, ShadowUse};
use crate::machine::Machine;
use crate::memslots::{Protection, Slot, Snapshot, State as SlotState};
use crate::page::{Copies, Page, PresentPage};
use crate::private::Kind;
use crate::second_stage::{Answer, Progress, Purpose};
use crate::shadow::{Placed, Tables};

/// What came of a fault: KVM's `RET_PF_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A mapping was made or widened.
    Fixed,
    /// All was well already.
    Spurious,
    /// Something changed meanwhile: let the guest fault again.
    Retry,
    /// No memory there: at this address of the guest's memory.
    Emulate(Gpa),
    /// Memory that may only be read, at this address.
    EmulateWrite(Gpa),
    /// The write was done for the guest.
    Written,
    /// The guest's own tables do not translate the access: the fault is for the guest to handle.
    Guest,
}

/// What a fault found out on its way to a page.
struct Way<'m> {
    machine: &'m Machine,
    root: &'m Loaded,
    address: Gpa,
    operation: Operation,
    slot: &'m Slot,
    gfn: Gfn,
}

impl SoftVcpu {
    /// Handles one exit. Counts all but the exit itself.
    pub(super) fn fault(&mut self, address: Gpa, operation: Operation) -> Result<Outcome, Errno> {
        self.machine.check_alive()?;
        let machine = Arc::clone(&self.machine);
        let root = self.load_root()?;
        let _reading = machine.slots.enter();
        let slots = machine.slots.current();
        if let Some(gfn) = root.mmio().find(address.frame(), slots.generation)
            && self.leads_to(&root, &slots, address, operation) == Some(gfn)
        {
            // The MMIO mapping tells at once; KVM does not count this as a fault. It stays where the page becomes private,
            // since attributes are changed slot by slot.
            return Ok(Outcome::Emulate(place(gfn, address)));
        }
        self.counters.pf_taken += 1;
        let outcome = self.page_fault(&root, &slots, address, operation)?;
        match outcome {
            Outcome::Fixed => self.counters.pf_fixed += 1,
            Outcome::Spurious => self.counters.pf_spurious += 1,
            Outcome::Emulate(_) | Outcome::EmulateWrite(_) | Outcome::Written => {
                self.counters.pf_emulate += 1;
            }
            Outcome::Guest => self.counters.pf_guest += 1,
            Outcome::Retry => {}
        }
        Ok(outcome)
    }

    /// The page that an address leads to, by the guest's tables where those are shadowed.
    fn leads_to(&self, root: &Loaded, slots: &Snapshot, address: Gpa, operation: Operation) -> Option<Gfn> {
        let Some(table) = root.table() else { return Some(address.frame()) };
        let sequence = self.machine.invalidations.snapshot();
        let tables = Tables::new(&self.machine, slots, self.space(), sequence);
        guest_frame(&tables, table, address, operation.access()).ok()
    }

    fn page_fault(
        &mut self,
        root: &Loaded,
        slots: &Snapshot,
        address: Gpa,
        operation: Operation,
    ) -> Result<Outcome, Errno> {
        let machine = Arc::clone(&self.machine);
        let sequence = machine.invalidations.snapshot();
        let tables = Tables::new(&machine, slots, self.space(), sequence);
        let gfn = match root.table().map(|table| guest_frame(&tables, table, address, operation.access())) {
            None => address.frame(),
            Some(_) if tables.are_stale() => return Ok(Outcome::Retry),
            Some(Ok(gfn)) => gfn,
            Some(Err(_)) => return Ok(Outcome::Guest),
        };
        let (kind, _) = machine.kind_of(gfn, 1);
        let Some(slot) = slots.find(self.space(), gfn) else {
            if kind == Kind::Private {
                return self.exit_for(gfn, kind, Errno::FAULT);
            }
            let at = place(gfn, address);
            if at < machine.gpa_end() {
                if root.is_obsolete() {
                    return Ok(Outcome::Retry);
                }
                root.mmio().note(address.frame(), gfn, slots.generation);
                self.counters.pf_mmio_spte_created += 1;
            }
            return Ok(Outcome::Emulate(at));
        };
        if slot.state == SlotState::Dying {
            return Ok(Outcome::Retry);
        }
        let touch = match operation.access() {
            // A private page is missed first: a read-only slot has no private memory.
            Access::Write if slot.protection == Protection::ReadOnly && kind == Kind::Shared => {
                return Ok(Outcome::EmulateWrite(place(gfn, address)));
            }
            Access::Write => Touch::Write,
            _ => Touch::Read,
        };
        let was = root.permissions(address);
        if was.is_some_and(|permissions| permissions.permits(operation.access())) {
            return Ok(Outcome::Spurious);
        }
        let page = gfn..Gfn::new(gfn.number() + 1);
        if !machine.invalidations.allows(sequence, &page) {
            return Ok(Outcome::Retry);
        }
        let (run, _held) = match kind {
            Kind::Private => {
                let (run, held) = self.get_private(slot, gfn, 1)?;
                (run, Some(held))
            }
            Kind::Shared => {
                let copies = if self.copied.take() == Some(gfn) { Copies::Believed } else { Copies::Replace };
                let page = machine.get_page(slot.hva(gfn), touch, copies, &mut self.runs)?;
                let Page::Is(run) = page else {
                    self.copied = Some(gfn);
                    return Ok(Outcome::Retry);
                };
                (run, None)
            }
        };
        let answer = Answer { gfn, run, sequence };
        let way = Way { machine: &machine, root, address, operation, slot, gfn };
        let outcome = way.end(answer, &tables)?;
        if outcome == Outcome::Fixed && slot.dirty.is_some() && was == Some(Permissions::READ_EXECUTE) {
            self.counters.pf_fast += 1;
        }
        Ok(outcome)
    }
}

impl Way<'_> {
    /// Maps the page that the host has, or writes to it where the shadow must learn of that.
    fn end(&self, answer: Answer, tables: &Tables<'_>) -> Result<Outcome, Errno> {
        if let Operation::Store(value) = self.operation
            && self.machine.shadow.mmu.is_tracked(self.gfn)
        {
            return Ok(self.write_table(value, PresentPage::new(self.gfn, &answer.run, answer.sequence)));
        }
        let progress = match self.root {
            Loaded::Shadow(used) if used.table.is_some() => self.shadow(used, answer, tables)?,
            root => self.machine.map(root, self.slot, self.gfn, 1, answer, Purpose::Fault)?,
        };
        Ok(match progress {
            Progress { pages: 0, .. } => Outcome::Retry,
            Progress { changed: false, .. } => Outcome::Spurious,
            Progress { .. } => Outcome::Fixed,
        })
    }

    /// Makes the shadow of the guest's tables follow them to the page.
    fn shadow(&self, used: &ShadowUse, answer: Answer, tables: &Tables<'_>) -> Result<Progress, Errno> {
        let demand = Demand::Access(self.operation.access());
        let page = self.machine.host_page(self.slot, self.gfn, answer);
        Ok(match self.machine.place_shadow(used, self.address, demand, page, Some(tables))? {
            Placed::Mapped(permissions) => {
                if permissions.writable() {
                    self.slot.mark_dirty(self.gfn, 1);
                }
                Progress { pages: 1, changed: true }
            }
            Placed::Spurious => Progress { pages: 1, changed: false },
            Placed::Emulate | Placed::Stale => Progress::default(),
        })
    }

    /// Writes to a table that is shadowed, and tells the shadow.
    fn write_table(&self, value: u64, page: PresentPage) -> Outcome {
        let gpa = place(self.gfn, self.address);
        let section = self.machine.shadow.enter();
        let Some(word) = self.machine.word(&section, &page, gpa, Touch::Write) else {
            return Outcome::Retry;
        };
        word.store(value, Ordering::Release);
        drop(section);
        self.slot.mark_dirty(self.gfn, 1);
        self.machine.shadow.flush(self.machine.shadow.mmu.written(gpa));
        Outcome::Written
    }
}

/// Where an address lies in the guest's memory that leads to a page.
fn place(gfn: Gfn, address: Gpa) -> Gpa {
    gfn.address().wrapping_add(address.page_offset())
}
