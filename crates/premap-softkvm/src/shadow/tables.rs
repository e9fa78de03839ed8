//! The guest's own tables, as the shadow reads them: through the slots, from the VMM's memory.
//!
//! A fault walks them twice. First at leisure: each table's page is asked of the host, made present if it is not, and
//! remembered ([`Tables`]). Then under the lock of the shadow pages, where nothing may be waited for: only what is remembered is read,
//! and only while it holds ([`Known`]). Whatever changed in between makes the fault start again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use premap_address::{Gfn, Gpa, Pfn};
use premap_mmu::Access;
use premap_mmu::shadow::GuestMemory;

use super::Section;
use super::fault::HostPage;
use crate::host::{Run, Touch};
use crate::invalidation::Sequence;
use crate::machine::Machine;
use crate::memslots::{AddressSpace, Protection, Slot, Snapshot, State};
use crate::page::{Copies, Page, PresentPage};

/// Tables of the guest, each looked at when it is first needed.
#[derive(Debug)]
pub(crate) struct Tables<'m> {
    machine: &'m Machine,
    slots: &'m Snapshot,
    space: AddressSpace,
    sequence: Sequence,
    /// `None`: no memory there.
    found: RefCell<BTreeMap<Gfn, Option<Table<'m>>>>,
    runs: RefCell<Vec<Run>>,
    stale: Cell<bool>,
}

/// A page with a table.
#[derive(Clone, Copy, Debug)]
struct Table<'m> {
    slot: &'m Arc<Slot>,
    page: PresentPage,
    /// Nothing is noted in tables that can't be written, as KVM has it.
    takes_notes: bool,
}

/// The tables found so far and no others, and the host's page that they lead to. The holder is in a section.
#[derive(Debug)]
pub(crate) struct Known<'t, 'm> {
    tables: &'t Tables<'m>,
    section: &'t Section<'t>,
    page: HostPage<'t>,
}

impl<'m> Tables<'m> {
    /// The tables as these slots and the host have them since the moment of `sequence`.
    pub(crate) fn new(
        machine: &'m Machine,
        slots: &'m Snapshot,
        space: AddressSpace,
        sequence: Sequence,
    ) -> Self {
        let (found, runs, stale) = (RefCell::default(), RefCell::default(), Cell::new(false));
        Self { machine, slots, space, sequence, found, runs, stale }
    }

    /// Whether something was overtaken: then no answer counts.
    pub(crate) fn are_stale(&self) -> bool {
        self.stale.get()
    }

    /// What is known of them, and of the page that they lead to.
    pub(crate) fn known<'t>(&'t self, section: &'t Section<'t>, page: HostPage<'t>) -> Known<'t, 'm> {
        Known { tables: self, section, page }
    }

    /// The page of a table, asked of the host if it is not known.
    fn find(&self, gfn: Gfn) -> Option<Table<'m>> {
        if let Some(found) = self.found.borrow().get(&gfn) {
            return *found;
        }
        let found = self.look(gfn);
        self.found.borrow_mut().insert(gfn, found);
        found
    }

    fn look(&self, gfn: Gfn) -> Option<Table<'m>> {
        let slot = self.slots.find(self.space, gfn)?;
        if slot.state == State::Dying {
            self.stale.set(true);
            return None;
        }
        let hva = slot.hva(gfn);
        let writes = slot.protection == Protection::Writable && self.machine.host.may_write(hva).ok()?;
        // Walks write: a table whose page must be copied first is copied when it is first walked.
        let touch = if writes { Touch::Write } else { Touch::Read };
        match self.machine.get_page(hva, touch, Copies::Believed, &mut self.runs.borrow_mut()).ok()? {
            Page::Is(run) => {
                let page = PresentPage::new(gfn, &run, self.sequence);
                Some(Table { slot, page, takes_notes: writes })
            }
            Page::Replaced => {
                self.stale.set(true);
                None
            }
        }
    }

    fn read_in(&self, section: &Section<'_>, table: &Table<'_>, gpa: Gpa) -> Option<u64> {
        if self.stale.get() {
            return None;
        }
        let word = self.machine.word(section, &table.page, gpa, Touch::Read);
        self.stale.set(word.is_none());
        Some(word?.load(Ordering::Acquire))
    }

    fn exchange_in(&self, section: &Section<'_>, table: &Table<'_>, gpa: Gpa, old: u64, new: u64) -> bool {
        if !table.takes_notes {
            return true;
        }
        let Some(word) = self.machine.word(section, &table.page, gpa, Touch::Write) else {
            self.stale.set(true);
            return false;
        };
        let exchanged = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        table.slot.mark_dirty(gpa.frame(), 1);
        exchanged
    }
}

impl GuestMemory for Tables<'_> {
    fn read(&self, gpa: Gpa) -> Option<u64> {
        let table = self.find(gpa.frame())?;
        self.read_in(&self.machine.shadow.enter(), &table, gpa)
    }

    fn exchange(&self, gpa: Gpa, old: u64, new: u64) -> bool {
        let Some(table) = self.find(gpa.frame()) else { return false };
        self.exchange_in(&self.machine.shadow.enter(), &table, gpa, old, new)
    }

    /// Asked only of [`Known`].
    fn translate(&self, _: Gfn, _: Access) -> Option<(Pfn, bool)> {
        None
    }
}

impl Known<'_, '_> {
    fn find(&self, gfn: Gfn) -> Option<Table<'_>> {
        let found = self.tables.found.borrow().get(&gfn).copied();
        // A table that was not met before: the walk goes another way now.
        self.tables.stale.set(self.tables.stale.get() || found.is_none());
        found.flatten()
    }
}

impl GuestMemory for Known<'_, '_> {
    fn read(&self, gpa: Gpa) -> Option<u64> {
        self.tables.read_in(self.section, &self.find(gpa.frame())?, gpa)
    }

    fn exchange(&self, gpa: Gpa, old: u64, new: u64) -> bool {
        self.find(gpa.frame())
            .is_some_and(|table| self.tables.exchange_in(self.section, &table, gpa, old, new))
    }

    fn translate(&self, gfn: Gfn, access: Access) -> Option<(Pfn, bool)> {
        self.page.translate(gfn, access)
    }
}
