//! Moving a page in the host's memory: PAGE.RELOCATE.

use premap_address::Hpa;

use super::{Outcome, Seamcall};
use crate::Module;
use crate::operand::{Level, PageInfo};
use crate::pamt::{PageRecord, PageType};
use crate::sept::Value;
use crate::status::{Class, Operand};

impl Module {
    /// TDH.MEM.PAGE.RELOCATE (RCX = page, RDX = TDR, R8 = memory): moves a 4 KiB page of a TD, content and all, to a free page,
    /// takes its block back, and gives the address where it was. In a TD that can run it must have been blocked and tracked.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX, or R8 for the page where it is);
    /// OPERAND_BUSY (SEPT_TREE, SEPT_ENTRY, RCX); EPT_WALK_FAILED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX);
    /// GPA_RANGE_NOT_BLOCKED (RCX); TLB_TRACKING_NOT_DONE (RCX); those of the memory (R8).
    pub fn mem_page_relocate(&self, page: PageInfo, tdr: Hpa, memory: Hpa) -> Outcome<Hpa> {
        self.perform(Seamcall::MemPageRelocate, || {
            let open = self.open(Seamcall::MemPageRelocate, page, tdr)?;
            let (value, old) = (open.value(), open.value().frame());
            if memory == old.address() {
                return Err(Class::OPERAND_INVALID.on(Operand::R8).into());
            }
            let run = self.claim_mapped(&open, old)?;
            open.check_tracked(run.blocked(), Operand::RCX)?;
            let (new, claim) = self.claim_free(memory, Operand::R8)?;
            if !value.state().is_pending() {
                self.backing(new, Operand::R8)?.copy_from(self.backing(old, Operand::RCX)?);
            }
            run.release();
            claim.assign(PageRecord::of(PageType::Regular, Level::PT, open.tdr()));
            open.entry.set(Value::leaf(new, Level::PT, value.state().unblocked()));
            Ok(old.address())
        })
    }
}
