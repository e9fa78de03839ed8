//! Taking memory from a TD: PAGE.REMOVE, SEPT.REMOVE.

use premap_address::{Hpa, Pfn};

use super::mem_entry::Open;
use super::{Outcome, Seamcall};
use crate::Module;
use crate::operand::{Level, PageInfo};
use crate::pamt::{PageType, Run};
use crate::sept::Value;
use crate::status::{Class, Operand};
use crate::td::unclaimable;

impl Module {
    /// TDH.MEM.PAGE.REMOVE (RCX = page, RDX = TDR): takes a page of 4 KiB, 2 MiB or 1 GiB from a TD and gives its address. In a
    /// TD that can run it must have been blocked and tracked.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX); OPERAND_BUSY (SEPT_TREE, SEPT_ENTRY, RCX);
    /// EPT_WALK_FAILED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX); GPA_RANGE_NOT_BLOCKED (RCX); TLB_TRACKING_NOT_DONE (RCX).
    pub fn mem_page_remove(&self, page: PageInfo, tdr: Hpa) -> Outcome<Hpa> {
        self.perform(Seamcall::MemPageRemove, || {
            let open = self.open(Seamcall::MemPageRemove, page, tdr)?;
            let frame = open.value().frame();
            let run = self.claim_mapped(&open, frame)?;
            open.check_tracked(run.blocked(), Operand::RCX)?;
            open.td().children.sub(open.level.pages());
            run.release();
            open.entry.set(Value::FREE);
            Ok(frame.address())
        })
    }

    /// TDH.MEM.SEPT.REMOVE (RCX = page, RDX = TDR): unlinks a table without entries and gives its address. In a TD that can run
    /// it must have been blocked and tracked.
    ///
    /// # Errors
    /// As for [`mem_page_remove`](Self::mem_page_remove), and EPT_PAGE_NOT_FREE (RCX).
    pub fn mem_sept_remove(&self, page: PageInfo, tdr: Hpa) -> Outcome<Hpa> {
        self.perform(Seamcall::MemSeptRemove, || {
            let open = self.open(Seamcall::MemSeptRemove, page, tdr)?;
            let frame = open.value().frame();
            let run = self.claim_table(frame)?;
            open.check_tracked(run.blocked(), Operand::RCX)?;
            let table = self.backing(frame, Operand::RCX)?.entries();
            let is_free = |word: &crate::sync::AtomicU64| {
                Value::from_word(word.load(crate::sync::Ordering::Acquire)) == Value::FREE
            };
            if !table.iter().all(is_free) {
                return Err(open.refused(Class::EPT_PAGE_NOT_FREE));
            }
            open.td().children.sub(1);
            run.release();
            open.entry.set(Value::FREE);
            Ok(frame.address())
        })
    }

    /// Takes the PAMT entries of the page that an entry has.
    pub(crate) fn claim_mapped(&self, open: &Open<'_>, frame: Pfn) -> Outcome<Run<'_>> {
        let regular = |record: crate::PageRecord| record.kind == PageType::Regular;
        let run = self.pamt.claim_run(frame, open.level, regular);
        Ok(run.map_err(|error| unclaimable(error, Operand::RCX))?)
    }

    /// Takes the PAMT entry of a table.
    pub(crate) fn claim_table(&self, frame: Pfn) -> Outcome<Run<'_>> {
        let table = |record: crate::PageRecord| record.kind == PageType::SecureEpt;
        let run = self.pamt.claim_run(frame, Level::PT, table);
        Ok(run.map_err(|error| unclaimable(error, Operand::RCX))?)
    }
}
