//! A guest's fault: from the exit to the mapping that lets the instruction go on.
//!
//! As Linux does it (`kvm_mmu_page_fault`, `kvm_tdp_mmu_page_fault`):
//!
//! 1. Take the invalidation sequence, then see whether the page is private, and find its slot. None: the access is
//!    emulated, and an MMIO mapping remembers that; a private one goes back to the VMM. Dying: try again.
//! 2. Ask the host for the page, or the guest_memfd for a private one, and make it present if it is not.
//! 3. Where a write meets a page that must be copied first (the zero page, the page cache, a page shared by fork), the
//!    copy replaces a page that may be mapped: an invalidation, which makes this very fault's answer stale. The guest
//!    faults again, and the second fault maps the copy. This is why memory that was pre-faulted but never written costs two
//!    faults a page.
//! 4. Map it, under the leaf table's lock, if the sequence still holds.

use std::ops::Range;
use std::thread;

use premap_address::{Gpa, Hva, PAGE_SIZE, PageSize};
use premap_kvm::Errno;
use premap_mmu::{Access, Permissions};

use super::SoftVcpu;
use crate::access::Operation;
use crate::host::{Exclusivity, Failure, Run, State, Touch, populate};
use crate::machine::Machine;
use crate::memslots::{Protection, State as SlotState};
use crate::private::Kind;
use crate::second_stage::{Answer, Purpose};
use crate::signals::raise_poisoned;

/// What came of a fault: KVM's `RET_PF_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A mapping was made or widened.
    Fixed,
    /// All was well already.
    Spurious,
    /// Something changed meanwhile: let the guest fault again.
    Retry,
    /// No memory there.
    Emulate,
    /// Memory that may only be read.
    EmulateWrite,
}

/// What the host says of one page that a guest needs.
enum Page {
    /// This.
    Is(Run),
    /// It was made just now, by replacing another: start again.
    Replaced,
}

/// What to make of a page that a write would have to copy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copies {
    /// The copy replaces a page that may be mapped.
    Replace,
    /// It was copied for this very write already. A kernel whose records do not tell whose a page is must not make the
    /// guest fault for ever.
    Believed,
}

impl SoftVcpu {
    /// Handles one exit. Counts all but the exit itself.
    pub(super) fn fault(&mut self, gpa: Gpa, operation: Operation) -> Result<Outcome, Errno> {
        self.machine.check_alive()?;
        if let Some(root) = &self.root
            && root.is_mmio(gpa.frame(), self.machine.slots.current().generation)
        {
            // The MMIO mapping tells at once; KVM does not count this as a fault. It stays where the page becomes private,
            // since attributes are changed slot by slot.
            return Ok(Outcome::Emulate);
        }
        self.counters.pf_taken += 1;
        let outcome = self.page_fault(gpa, operation)?;
        match outcome {
            Outcome::Fixed => self.counters.pf_fixed += 1,
            Outcome::Spurious => self.counters.pf_spurious += 1,
            Outcome::Emulate | Outcome::EmulateWrite => self.counters.pf_emulate += 1,
            Outcome::Retry => {}
        }
        Ok(outcome)
    }

    fn page_fault(&mut self, gpa: Gpa, operation: Operation) -> Result<Outcome, Errno> {
        let root = self.load_root()?;
        let machine = std::sync::Arc::clone(&self.machine);
        let _reading = machine.slots.enter();
        let slots = machine.slots.current();
        let gfn = gpa.frame();
        let sequence = machine.invalidations.snapshot();
        let (kind, _) = machine.kind_of(gfn, 1);
        let Some(slot) = slots.find(self.space, gfn) else {
            if kind == Kind::Private {
                return self.exit_for(gfn, kind, Errno::FAULT);
            }
            if gpa < machine.gpa_end() {
                if root.is_obsolete() {
                    return Ok(Outcome::Retry);
                }
                root.note_mmio(gfn, slots.generation);
                self.counters.pf_mmio_spte_created += 1;
            }
            return Ok(Outcome::Emulate);
        };
        if slot.state == SlotState::Dying {
            return Ok(Outcome::Retry);
        }
        let touch = match operation.access() {
            // A private page is missed first: a read-only slot has no private memory.
            Access::Write if slot.protection == Protection::ReadOnly && kind == Kind::Shared => {
                return Ok(Outcome::EmulateWrite);
            }
            Access::Write => Touch::Write,
            _ => Touch::Read,
        };
        let was = root.table.walk(gpa);
        if was.is_some_and(|mapping| mapping.attributes.permissions.permits(operation.access())) {
            return Ok(Outcome::Spurious);
        }
        let page = gfn..premap_address::Gfn::new(gfn.number() + 1);
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
        let progress = machine.map(&root, slot, gfn, 1, answer, Purpose::Fault)?;
        if progress.pages == 0 {
            return Ok(Outcome::Retry);
        }
        if !progress.changed {
            return Ok(Outcome::Spurious);
        }
        if slot.dirty.is_some()
            && was.is_some_and(|was| was.attributes.permissions == Permissions::READ_EXECUTE)
        {
            self.counters.pf_fast += 1;
        }
        Ok(Outcome::Fixed)
    }
}

impl Machine {
    /// Makes the page at `hva` present for this touch: KVM's `hva_to_pfn`.
    fn get_page(&self, hva: Hva, touch: Touch, copies: Copies, runs: &mut Vec<Run>) -> Result<Page, Errno> {
        let page = hva..hva.wrapping_add(PAGE_SIZE);
        loop {
            self.host.query(page.clone(), Exclusivity::Ask, runs)?;
            let run = runs.first().copied().ok_or(Errno::FAULT)?;
            let got = match (run.state, touch) {
                (State::NoAccess, _) => return Err(Errno::FAULT),
                (State::Writable, _) | (State::Readable, Touch::Read) => return Ok(Page::Is(run)),
                (State::Absent, _) => populate(page.clone(), touch).map(|()| None),
                (State::Readable, Touch::Write) if !self.host.may_write(hva)? => return Err(Errno::FAULT),
                (State::Readable, Touch::Write) if copies == Copies::Believed => {
                    let writable = Run { state: State::Writable, ..run };
                    populate(page.clone(), touch).map(|()| Some(Page::Is(writable)))
                }
                (State::Readable, Touch::Write) => {
                    self.begin_invalidation(&replaced(&page, run.size));
                    let copied = populate(page.clone(), touch);
                    self.end_invalidation();
                    copied.map(|()| Some(Page::Replaced))
                }
            };
            match got {
                Ok(Some(page)) => return Ok(page),
                Ok(None) => {}
                Err(Failure::Again | Failure::Interrupted) => thread::yield_now(),
                Err(Failure::BadAddress) => return Err(Errno::FAULT),
                Err(Failure::Poisoned) => {
                    // The signal is what the VMM acts on; KVM_RUN itself then ends with EINTR.
                    raise_poisoned(hva);
                    return Err(Errno::INTR);
                }
            }
        }
    }
}

/// What a copy takes the place of: all of a huge page that is shared, since the host splits or replaces it.
fn replaced(page: &Range<Hva>, size: PageSize) -> Range<Hva> {
    let start = page.start.align_down(size);
    start..start.wrapping_add(size.bytes())
}
