//! The measurement: MR.EXTEND, MR.FINALIZE.

use premap_address::{Gpa, Hpa};
use premap_tdx::measure::{CHUNK, Chunk};

use super::{EntryInfo, Failure, Outcome, Seamcall};
use crate::Module;
use crate::operand::Level;
use crate::sept::walk;
use crate::status::{Class, Operand};
use crate::sync::Ordering;
use crate::td::{Measured, OpState, exclusive};

impl Module {
    /// TDH.MR.EXTEND (RCX = GPA, RDX = TDR): measures 256 bytes of a page that was added.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; OPERAND_INVALID (RCX) for an address that is not private or not
    /// aligned to 256; EPT_ENTRY_NOT_PRESENT, with RCX where there is no page, and without an operand where it is not mapped.
    pub fn mr_extend(&self, gpa: Gpa, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MrExtend, || {
            let sole = self.td_alone(tdr, Operand::RDX)?.ready_for(Seamcall::MrExtend)?;
            let td = sole.td();
            if !gpa.raw().is_multiple_of(CHUNK as u64) || !td.is_private(gpa) {
                return Err(Class::OPERAND_INVALID.on(Operand::RCX).into());
            }
            let missing = Class::EPT_ENTRY_NOT_PRESENT.on(Operand::RCX);
            let walk = walk(&self.memory, td.root(), td.top_level(), gpa, Level::PT).ok_or(missing)?;
            let state = walk.value.state();
            if !state.is_leaf() || !state.is_present() {
                return Err(Failure::about(missing, EntryInfo::new(walk.value, walk.level)));
            }
            if !Seamcall::MrExtend.entry_states().contain(state) {
                return Err(Class::EPT_ENTRY_NOT_PRESENT.status().into());
            }
            let within = gpa.raw() % walk.level.bytes();
            let frame = walk.value.frame().address().wrapping_add(within).frame();
            let mut content = [0; CHUNK];
            #[expect(clippy::cast_possible_truncation, reason = "below a page's size")]
            self.backing(frame, Operand::RCX)?.read(gpa.page_offset() as usize, &mut content);
            if let Measured::Running(mrtd) = &mut *exclusive(&td.measured) {
                mrtd.extend(gpa, Chunk::new(&content));
            }
            Ok(())
        })
    }

    /// TDH.MR.FINALIZE (RCX = TDR): ends the measurement. The TD can run then, and no page be added any more.
    ///
    /// # Errors
    /// Those of the TDR (RCX) and of a TD that is not ready; NO_VCPUS.
    pub fn mr_finalize(&self, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MrFinalize, || {
            let sole = self.td_alone(tdr, Operand::RCX)?.ready_for(Seamcall::MrFinalize)?;
            let td = sole.td();
            if td.vcpus.load(Ordering::Acquire) == 0 {
                return Err(Class::NO_VCPUS.status().into());
            }
            let measured = &mut *exclusive(&td.measured);
            if let Measured::Running(mrtd) = std::mem::take(measured) {
                *measured = Measured::Final(mrtd.finish().mrtd);
            }
            td.set_op_state(OpState::Runnable);
            Ok(())
        })
    }
}
