//! TDG.MEM.PAGE.ACCEPT.

use super::{Cause, EptViolation, Guest, Stop};
use crate::operand::{Level, PageInfo};
use crate::sept::{EntryState, Walk, lock_by_guest, walk};
use crate::status::{Class, Operand};

impl Guest<'_> {
    /// TDG.MEM.PAGE.ACCEPT (RCX = page): accepts a page of 4 KiB or 2 MiB that is pending. It is zero then.
    ///
    /// # Errors
    /// OPERAND_INVALID (RCX); PAGE_ALREADY_ACCEPTED with the level at which it is mapped; PAGE_SIZE_MISMATCH with the level,
    /// where smaller pages are; OPERAND_BUSY or OPERAND_BUSY_HOST_PRIORITY (SEPT_ENTRY) while the host has or wants the entry.
    /// Where there is no page, or a blocked one, or a larger one that is pending, the vCPU exits.
    pub fn accept(&self, page: PageInfo) -> Result<(), Stop> {
        let invalid = Class::OPERAND_INVALID.on(Operand::RCX);
        let (gpa, asked) = page.parse(&(Level::PT..=Level::PD)).ok_or(invalid)?;
        if !self.td.is_private(gpa) {
            return Err(invalid.into());
        }
        let found = walk(&self.module.memory, self.td.root(), self.td.top_level(), gpa, asked);
        let Walk { word, value, level } = found.ok_or(invalid)?;
        let exit = |state| Stop::Exit(EptViolation { gpa, cause: Cause::Accept, asked, level, state });
        let already = || Stop::Status(Class::PAGE_ALREADY_ACCEPTED.with(level.raw().into()));
        if level > asked {
            let mapped = value.state().is_leaf() && value.state().is_present();
            return Err(if mapped { already() } else { exit(value.state()) });
        }
        let entry = lock_by_guest(word).map_err(|class| class.on(Operand::SEPT_ENTRY))?;
        let value = entry.value();
        match value.state() {
            EntryState::Pending => {
                for page in 0..asked.pages() {
                    let frame = value.frame().checked_add(page).ok_or(invalid)?;
                    // Memory that nobody has touched is zero, and stays unmade: a large TD that is accepted and never
                    // written takes none of ours.
                    if let Some(page) = self.module.memory.get_if_made(frame) {
                        page.zero();
                    }
                }
                entry.set(value.in_state(EntryState::Mapped));
                Ok(())
            }
            EntryState::Mapped | EntryState::BlockedForWriting => Err(already()),
            EntryState::NonLeafMapped | EntryState::NonLeafBlocked => {
                Err(Class::PAGE_SIZE_MISMATCH.with(level.raw().into()).into())
            }
            state => Err(exit(state)),
        }
    }
}
