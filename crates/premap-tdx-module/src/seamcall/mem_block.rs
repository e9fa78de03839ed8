//! Taking translations away in two steps: RANGE.BLOCK and UNBLOCK, TRACK.

use premap_address::{Hpa, Pfn};

use super::{Outcome, Seamcall};
use crate::Module;
use crate::operand::PageInfo;
use crate::status::{Class, Operand, Status};

impl Module {
    /// TDH.MEM.RANGE.BLOCK (RCX = page, RDX = TDR): blocks new translations through an entry, and notes the epoch.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX); OPERAND_BUSY (SEPT_TREE, SEPT_ENTRY);
    /// EPT_WALK_FAILED (RCX); GPA_RANGE_ALREADY_BLOCKED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX).
    pub fn mem_range_block(&self, page: PageInfo, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MemRangeBlock, || {
            let mut open = self.open(Seamcall::MemRangeBlock, page, tdr)?;
            let value = open.value();
            open.entry.publish(value.in_state(value.state().blocked()));
            self.entry_of(value.frame())?.set_blocked(open.td().epochs.current());
            Ok(())
        })
    }

    /// TDH.MEM.RANGE.UNBLOCK (RCX = page, RDX = TDR): takes a block back, after it was tracked.
    ///
    /// # Errors
    /// As for [`mem_range_block`](Self::mem_range_block), and TLB_TRACKING_NOT_DONE (SEPT_TREE).
    pub fn mem_range_unblock(&self, page: PageInfo, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MemRangeUnblock, || {
            let open = self.open(Seamcall::MemRangeUnblock, page, tdr)?;
            let value = open.value();
            open.check_tracked(self.entry_of(value.frame())?.blocked(), Operand::SEPT_TREE)?;
            open.entry.set(value.in_state(value.state().unblocked()));
            Ok(())
        })
    }

    /// TDH.MEM.TRACK (RCX = TDR): starts the next TLB epoch.
    ///
    /// # Errors
    /// Those of the TDR (RCX) and of a TD that is not ready; OPERAND_BUSY (TD_EPOCH) while a vCPU enters;
    /// PREVIOUS_TLB_EPOCH_BUSY while one is left in the epoch before.
    pub fn mem_track(&self, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MemTrack, || {
            let admitted = self.td_shared(tdr, Operand::RCX)?.ready_for(Seamcall::MemTrack)?;
            Ok(admitted.td.epochs.track()?)
        })
    }

    /// The PAMT entry of a page that a Secure-EPT entry has.
    fn entry_of(&self, frame: Pfn) -> Result<&crate::pamt::Entry, Status> {
        self.pamt.entry(frame).ok_or(Class::PAGE_METADATA_INCORRECT.on(Operand::RCX))
    }
}
