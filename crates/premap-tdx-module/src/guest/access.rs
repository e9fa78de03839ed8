//! The guest's reads and writes of private memory.

use premap_address::{Gpa, Pfn};

use super::{Cause, EptViolation, Guest, Stop};
use crate::operand::Level;
use crate::sept::{EntryState, walk};
use crate::status::{Class, Operand};

const PAGE_BYTES: usize = crate::phymem::BYTES;

impl Guest<'_> {
    /// Reads private memory from `gpa` on.
    ///
    /// # Errors
    /// The vCPU exits at the first page that is not mapped, or not accepted. OPERAND_INVALID (RCX) for an address that is not
    /// private. What lies before was read.
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), Stop> {
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let (frame, offset) = self.translate(at, Cause::Read)?;
            let piece = (bytes.len() - done).min(PAGE_BYTES - offset);
            let page = self.module.backing(frame, Operand::RCX)?;
            page.read(offset, &mut bytes[done..done + piece]);
            done += piece;
        }
        Ok(())
    }

    /// Writes private memory from `gpa` on.
    ///
    /// # Errors
    /// As for [`read`](Self::read). What lies before was written.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Stop> {
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa.wrapping_add(done as u64);
            let (frame, offset) = self.translate(at, Cause::Write)?;
            let piece = (bytes.len() - done).min(PAGE_BYTES - offset);
            let page = self.module.backing(frame, Operand::RCX)?;
            page.write(offset, &bytes[done..done + piece]);
            done += piece;
        }
        Ok(())
    }

    /// The page behind an address, and the offset in it.
    fn translate(&self, gpa: Gpa, cause: Cause) -> Result<(Pfn, usize), Stop> {
        let invalid = Class::OPERAND_INVALID.on(Operand::RCX);
        if !self.td.is_private(gpa) {
            return Err(invalid.into());
        }
        let found = walk(&self.module.memory, self.td.root(), self.td.top_level(), gpa, Level::PT);
        let found = found.ok_or(invalid)?;
        let state = found.value.state();
        let allowed = match cause {
            Cause::Write => state == EntryState::Mapped,
            Cause::Read | Cause::Accept => state.is_leaf() && state.is_present(),
        };
        if !allowed {
            let asked = Level::PT;
            return Err(Stop::Exit(EptViolation { gpa, cause, asked, level: found.level, state }));
        }
        let frame = found.value.frame().address().wrapping_add(gpa.raw() % found.level.bytes()).frame();
        #[expect(clippy::cast_possible_truncation, reason = "below a page's size")]
        Ok((frame, gpa.page_offset() as usize))
    }
}
