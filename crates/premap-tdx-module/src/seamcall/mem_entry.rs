//! The beginning of every call on a Secure-EPT entry but PAGE.ADD and MR.EXTEND: the TD, the page, the tree's lock, the walk,
//! the entry's lock, and whether its state allows the call.

use premap_address::{Gpa, Hpa, Pfn};

use super::{EntryInfo, Failure, Outcome, Seamcall};
use crate::Module;
use crate::locks::{Exclusive, Shared};
use crate::operand::{Level, PageInfo};
use crate::sept::{Locked, States, Value, Walk, lock_by_host, walk};
use crate::status::{Class, Operand};
use crate::td::{Admitted, Td};

/// An entry that a call may change. Locks are given back in the order of the fields.
#[derive(Debug)]
pub(crate) struct Open<'m> {
    pub(crate) entry: Locked<'m>,
    pub(crate) level: Level,
    _tree: Tree<'m>,
    admitted: Admitted<'m>,
}

/// How the tree is held, until dropped.
#[derive(Debug)]
enum Tree<'m> {
    Shared { _lock: Shared<'m> },
    Alone { _lock: Exclusive<'m> },
}

impl<'m> Open<'m> {
    pub(crate) fn td(&self) -> &'m Td {
        self.admitted.td
    }

    pub(crate) fn tdr(&self) -> Pfn {
        self.admitted.tdr
    }

    /// The entry as it was found.
    pub(crate) fn value(&self) -> Value {
        self.entry.value()
    }

    /// A failure that tells the entry.
    pub(crate) fn refused(&self, class: Class) -> Failure {
        Failure::about(class.on(Operand::RCX), EntryInfo::new(self.value(), self.level))
    }

    /// Whether no vCPU can use what the entry maps any more: always so while the TD can't run.
    ///
    /// # Errors
    /// GPA_RANGE_NOT_BLOCKED; or TLB_TRACKING_NOT_DONE about `operand`, for a page blocked in this epoch.
    pub(crate) fn check_tracked(&self, blocked: u64, operand: Operand) -> Outcome {
        if !self.td().op_state().needs_tracking() {
            return Ok(());
        }
        if !self.value().state().is_blocked() {
            return Err(self.refused(Class::GPA_RANGE_NOT_BLOCKED));
        }
        if !self.td().epochs.is_tracked(blocked) {
            return Err(Class::TLB_TRACKING_NOT_DONE.on(operand).into());
        }
        Ok(())
    }

    /// Waits for the walks of this moment, so that nobody is left in a table that was unlinked. Walks wait for nothing.
    pub(crate) fn wait_for_walks(&self) {
        self.td().walks.wait_for_leavers();
    }
}

impl Module {
    /// Opens the entry that a call is about.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX) for the page; OPERAND_BUSY (SEPT_TREE);
    /// EPT_WALK_FAILED (RCX); OPERAND_BUSY (SEPT_ENTRY); EPT_ENTRY_STATE_INCORRECT, or GPA_RANGE_ALREADY_BLOCKED of BLOCK.
    #[inline]
    pub(crate) fn open(&self, call: Seamcall, page: PageInfo, tdr: Hpa) -> Outcome<Open<'_>> {
        self.open_in(call, call.entry_states(), page, tdr)
    }

    /// Opens the entry that a call is about, with states of its own choice.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    #[inline]
    pub(crate) fn open_in(
        &self,
        call: Seamcall,
        states: States,
        page: PageInfo,
        tdr: Hpa,
    ) -> Outcome<Open<'_>> {
        let admitted = self.td_shared(tdr, Operand::RDX)?.ready_for(call)?;
        let td = admitted.td;
        let invalid = Class::OPERAND_INVALID.on(Operand::RCX);
        let (gpa, level) = page.parse(&call.levels(td.top_level())).ok_or(invalid)?;
        if !td.is_private(gpa) {
            return Err(invalid.into());
        }
        let tree = match call {
            Seamcall::MemRangeBlock | Seamcall::MemRangeUnblock | Seamcall::MemSeptRemove => {
                td.tree.try_exclusive().map(|lock| Tree::Alone { _lock: lock })
            }
            _ => td.tree.try_shared().map(|lock| Tree::Shared { _lock: lock }),
        };
        let tree = tree.ok_or(Class::OPERAND_BUSY.on(Operand::SEPT_TREE))?;
        let entry = self.lock_entry(td, gpa, level)?;
        let open = Open { entry, level, _tree: tree, admitted };
        let state = open.value().state();
        if states.contain(state) {
            Ok(open)
        } else if call == Seamcall::MemRangeBlock && state.is_blocked() {
            Err(open.refused(Class::GPA_RANGE_ALREADY_BLOCKED))
        } else {
            Err(open.refused(Class::EPT_ENTRY_STATE_INCORRECT))
        }
    }

    /// Finds an entry and takes its lock, before the table that holds it can go away.
    #[inline]
    fn lock_entry(&self, td: &Td, gpa: Gpa, level: Level) -> Outcome<Locked<'_>> {
        let _inside = td.walks.enter();
        let found = self.walk_to(td, gpa, level)?;
        let busy = Class::OPERAND_BUSY.on(Operand::SEPT_ENTRY);
        let info = EntryInfo::new(found.value, found.level);
        lock_by_host(found.word).ok_or(Failure::about(busy, info))
    }

    /// Walks to an entry.
    ///
    /// # Errors
    /// EPT_WALK_FAILED (RCX), with the entry at which the walk ended.
    #[inline]
    pub(crate) fn walk_to(&self, td: &Td, gpa: Gpa, level: Level) -> Outcome<Walk<'_>> {
        let failed = Class::EPT_WALK_FAILED.on(Operand::RCX);
        let found = walk(&self.memory, td.root(), td.top_level(), gpa, level).ok_or(failed)?;
        if found.level == level {
            Ok(found)
        } else {
            Err(Failure::about(failed, EntryInfo::new(found.value, found.level)))
        }
    }

    /// TDH.MEM.SEPT.RD (RCX = page, RDX = TDR): reads an entry.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX); OPERAND_BUSY; EPT_WALK_FAILED (RCX).
    pub fn mem_sept_rd(&self, page: PageInfo, tdr: Hpa) -> Outcome<EntryInfo> {
        self.perform(Seamcall::MemSeptRd, || {
            let open = self.open(Seamcall::MemSeptRd, page, tdr)?;
            Ok(EntryInfo::new(open.value(), open.level))
        })
    }
}
