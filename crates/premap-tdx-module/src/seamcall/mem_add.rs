//! Giving a TD memory: SEPT.ADD, PAGE.ADD, PAGE.AUG.

use std::borrow::Cow;

use premap_address::{Hpa, PAGE_SIZE, Pfn};

use super::mem_entry::Open;
use super::{EntryInfo, Failure, Outcome, Seamcall};
use crate::Module;
use crate::operand::{Level, PageInfo};
use crate::pamt::{PageRecord, PageType};
use crate::phymem::{BYTES, Page};
use crate::sept::{EntryState, States, Value, clear_table, lock_by_host};
use crate::status::{Class, Operand, Status};
use crate::td::{Measured, exclusive};

/// Where PAGE.ADD copies from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// A page of the machine's memory, with a shared HKID: R9.
    Memory(Hpa),
    /// A page of the host's that the machine's memory does not hold, such as a VMM's buffer.
    Bytes(&'a [u8; 4096]),
}

impl From<Hpa> for Source<'_> {
    fn from(hpa: Hpa) -> Self {
        Self::Memory(hpa)
    }
}

impl<'a> From<&'a [u8; 4096]> for Source<'a> {
    fn from(bytes: &'a [u8; 4096]) -> Self {
        Self::Bytes(bytes)
    }
}

/// What became of a table's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// It is a table now.
    Added,
    /// There was a table, and the page is free.
    Kept,
}

impl Module {
    /// TDH.MEM.SEPT.ADD (RCX = page, RDX = TDR, R8 = table): links a free page as the table below an entry that is free.
    ///
    /// Calls on one TD run side by side with each other and with PAGE.AUG.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX); OPERAND_BUSY (SEPT_TREE, SEPT_ENTRY);
    /// EPT_WALK_FAILED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX); those of the table (R8).
    pub fn mem_sept_add(&self, page: PageInfo, tdr: Hpa, table: Hpa) -> Outcome {
        let call = Seamcall::MemSeptAdd;
        self.perform(call, || self.sept_add(self.open(call, page, tdr)?, table))
    }

    /// TDH.MEM.SEPT.ADD, version 1: the same, but a table that is there already is no error; the page then stays free.
    ///
    /// # Errors
    /// As for [`mem_sept_add`](Self::mem_sept_add).
    pub fn mem_sept_add_or_keep(&self, page: PageInfo, tdr: Hpa, table: Hpa) -> Outcome<Table> {
        let call = Seamcall::MemSeptAdd;
        self.perform(call, || {
            let states = States::of(&[EntryState::Free, EntryState::NonLeafMapped]);
            let open = self.open_in(call, states, page, tdr)?;
            if open.value().state() == EntryState::NonLeafMapped {
                return Ok(Table::Kept);
            }
            self.sept_add(open, table).map(|()| Table::Added)
        })
    }

    #[inline]
    fn sept_add(&self, open: Open<'_>, table: Hpa) -> Outcome {
        let (frame, claim) = self.claim_free(table, Operand::R8)?;
        clear_table(self.backing(frame, Operand::R8)?);
        open.td().children.add(1);
        claim.assign(PageRecord::of(PageType::SecureEpt, Level::PT, open.tdr()));
        open.entry.set(Value::table(frame));
        Ok(())
    }

    /// TDH.MEM.PAGE.AUG (RCX = page, RDX = TDR, R8 = memory): gives free memory of 4 KiB or 2 MiB to a TD, pending until the
    /// guest accepts it.
    ///
    /// Calls on one TD run side by side with each other and with SEPT.ADD.
    ///
    /// # Errors
    /// As for [`mem_sept_add`](Self::mem_sept_add), with R8 for the memory.
    pub fn mem_page_aug(&self, page: PageInfo, tdr: Hpa, memory: Hpa) -> Outcome {
        self.perform(Seamcall::MemPageAug, || {
            let open = self.open(Seamcall::MemPageAug, page, tdr)?;
            let (frame, run) = self.claim_free_run(memory, open.level, Operand::R8)?;
            open.td().children.add(open.level.pages());
            run.assign(PageRecord::of(PageType::Regular, open.level, open.tdr()));
            open.entry.set(Value::leaf(frame, open.level, EntryState::Pending));
            Ok(())
        })
    }

    /// TDH.MEM.PAGE.ADD (RCX = page, RDX = TDR, R8 = memory, R9 = source): copies 4 KiB of the host's memory into a free page,
    /// maps it in the TD, and measures its address. The call has the TD alone.
    ///
    /// # Errors
    /// In this order: those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX) for a page that is not of
    /// 4 KiB, aligned and private; EPT_WALK_FAILED (RCX); EPT_ENTRY_STATE_INCORRECT (RCX); OPERAND_INVALID (R9) for a source
    /// that is not aligned, has a private HKID, or is not there; those of the memory (R8).
    pub fn mem_page_add<'a>(
        &self,
        page: PageInfo,
        tdr: Hpa,
        memory: Hpa,
        source: impl Into<Source<'a>>,
    ) -> Outcome {
        let call = Seamcall::MemPageAdd;
        self.perform(call, || {
            let sole = self.td_alone(tdr, Operand::RDX)?.ready_for(call)?;
            let td = sole.td();
            let invalid = Class::OPERAND_INVALID.on(Operand::RCX);
            let (gpa, level) = page.parse(&call.levels(td.top_level())).ok_or(invalid)?;
            if !td.is_private(gpa) {
                return Err(invalid.into());
            }
            let found = self.walk_to(td, gpa, level)?;
            if !call.entry_states().contain(found.value.state()) {
                let status = Class::EPT_ENTRY_STATE_INCORRECT.on(Operand::RCX);
                return Err(Failure::about(status, EntryInfo::new(found.value, found.level)));
            }
            // Read before the target is claimed: reading may wait, and the two may be one page.
            let content = self.content(source.into())?;
            let (frame, claim) = self.claim_free(memory, Operand::R8)?;
            // With the TD alone nobody else has the entry.
            let busy = Class::OPERAND_BUSY.on(Operand::SEPT_ENTRY);
            let entry = lock_by_host(found.word).ok_or(busy)?;
            self.backing(frame, Operand::R8)?.fill_from(&content);
            if let Measured::Running(mrtd) = &mut *exclusive(&td.measured) {
                mrtd.add(gpa);
            }
            td.children.add(1);
            claim.assign(PageRecord::of(PageType::Regular, Level::PT, sole.tdr));
            entry.set(Value::leaf(frame, Level::PT, EntryState::Mapped));
            Ok(())
        })
    }

    /// What is to be copied from a source.
    fn content<'a>(&self, source: Source<'a>) -> Result<Cow<'a, [u8; BYTES]>, Status> {
        match source {
            Source::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
            Source::Memory(hpa) => {
                let invalid = Class::OPERAND_INVALID.on(Operand::R9);
                let source = self.keys.shared(hpa, PAGE_SIZE).ok_or(invalid)?;
                self.page_as_host_sees_it(source.frame()).map(Cow::Owned).ok_or(invalid)
            }
        }
    }

    /// The bytes of a page that is in a TDMR, and so in memory.
    #[inline]
    pub(crate) fn backing(&self, frame: Pfn, operand: Operand) -> Result<&Page, Status> {
        self.memory.get(frame).ok_or(Class::OPERAND_ADDR_RANGE_ERROR.on(operand))
    }
}
