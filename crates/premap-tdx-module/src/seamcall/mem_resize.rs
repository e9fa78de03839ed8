//! Changing a mapping's size: PAGE.PROMOTE, PAGE.DEMOTE.

use premap_address::{Hpa, PAGE_SIZE, Pfn};

use super::mem_entry::Open;
use super::{Failure, Outcome, Seamcall};
use crate::Module;
use crate::operand::{ENTRIES, Level, PageInfo};
use crate::pamt::{PageRecord, PageType};
use crate::phymem::Page;
use crate::sept::{EntryState, Locked, Value, lock_by_host};
use crate::status::{Class, Operand};
use crate::sync::Ordering;

/// The page that entry `index` has of one that starts at `first` and is split into pages of `level`.
fn part(first: Pfn, level: Level, index: usize) -> Pfn {
    first.address().wrapping_add(index as u64 * level.bytes()).frame()
}

impl Module {
    /// TDH.MEM.PAGE.PROMOTE (RCX = page, RDX = TDR): makes the pages of a table one page of 2 MiB or 1 GiB, and gives the table's
    /// address. In a TD that can run the table must have been blocked and tracked.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX); OPERAND_BUSY (SEPT_TREE, SEPT_ENTRY, RCX);
    /// EPT_WALK_FAILED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX); GPA_RANGE_NOT_BLOCKED (RCX); TLB_TRACKING_NOT_DONE (RCX);
    /// EPT_INVALID_PROMOTE_CONDITIONS (RCX) unless all entries are mapped, or all pending, and their pages follow one another
    /// from a boundary of the larger size.
    pub fn mem_page_promote(&self, page: PageInfo, tdr: Hpa) -> Outcome<Hpa> {
        self.perform(Seamcall::MemPagePromote, || {
            let mut open = self.open(Seamcall::MemPagePromote, page, tdr)?;
            let table = open.value().frame();
            let table_run = self.claim_table(table)?;
            open.check_tracked(table_run.blocked(), Operand::RCX)?;
            let page = self.backing(table, Operand::RCX)?;
            let (children, first, state) = lock_children(&open, page)?;
            let larger = self.claim_mapped(&open, first)?;
            open.td().children.sub(1);
            larger.resize(open.level);
            open.entry.publish(Value::leaf(first, open.level, state));
            // From here on nobody finds the table, and who already has found it can lock none of its entries.
            children.into_iter().for_each(Locked::abandon);
            open.wait_for_walks();
            table_run.release();
            Ok(table.address())
        })
    }

    /// TDH.MEM.PAGE.DEMOTE (RCX = page, RDX = TDR, R8 = table): splits a page of 2 MiB or 1 GiB into those of a new table, which
    /// are not blocked. In a TD that can run the page must have been blocked and tracked.
    ///
    /// # Errors
    /// As for [`mem_page_promote`](Self::mem_page_promote) but the last, and those of the table (R8).
    pub fn mem_page_demote(&self, page: PageInfo, tdr: Hpa, table: Hpa) -> Outcome {
        self.perform(Seamcall::MemPageDemote, || {
            let open = self.open(Seamcall::MemPageDemote, page, tdr)?;
            let value = open.value();
            let below = open.level.below().ok_or(Class::OPERAND_INVALID.on(Operand::RCX))?;
            let blocked = self.pamt.entry(value.frame()).map_or(0, crate::pamt::Entry::blocked);
            open.check_tracked(blocked, Operand::RCX)?;
            let (frame, claim) = self.claim_free(table, Operand::R8)?;
            let larger = self.claim_mapped(&open, value.frame())?;
            let state = value.state().unblocked();
            for (index, word) in self.backing(frame, Operand::R8)?.entries().iter().enumerate() {
                let child = Value::leaf(part(value.frame(), below, index), below, state);
                word.store(child.raw(), Ordering::Relaxed);
            }
            open.td().children.add(1);
            claim.assign(PageRecord::of(PageType::SecureEpt, Level::PT, open.tdr()));
            larger.resize(below);
            open.entry.set(Value::table(frame));
            Ok(())
        })
    }
}

/// Takes every entry of the table below, if they make one larger page: which, and in what state.
fn lock_children<'m>(open: &Open<'m>, table: &'m Page) -> Outcome<(Vec<Locked<'m>>, Pfn, EntryState)> {
    let conditions = || open.refused(Class::EPT_INVALID_PROMOTE_CONDITIONS);
    let below = open.level.below().ok_or_else(conditions)?;
    let lock = |word| -> Result<Locked<'m>, Failure> {
        lock_by_host(word).ok_or_else(|| {
            let status = Class::OPERAND_BUSY.on(Operand::SEPT_ENTRY);
            Failure { status, ..open.refused(Class::OPERAND_BUSY) }
        })
    };
    let mut children = Vec::with_capacity(ENTRIES);
    let mut larger = None;
    for (index, word) in table.entries().iter().enumerate() {
        let child = lock(word)?;
        let value = child.value();
        let (first, state) = *larger.get_or_insert((value.frame(), value.state()));
        let starts = first.number().is_multiple_of(open.level.bytes() / PAGE_SIZE);
        let fits = matches!(state, EntryState::Mapped | EntryState::Pending) && starts;
        if !fits || value != Value::leaf(part(first, below, index), below, state) {
            return Err(conditions());
        }
        children.push(child);
    }
    let (first, state) = larger.ok_or_else(conditions)?;
    Ok((children, first, state))
}
