//! A TD's end: MNG.VPFLUSHDONE, KEY.FREEID. Then its pages are reclaimed.

use premap_address::Hpa;

use super::{Outcome, Seamcall};
use crate::Module;
use crate::status::{Class, Operand};
use crate::sync::Ordering;
use crate::td::Lifecycle;

impl Module {
    /// TDH.MNG.VPFLUSHDONE (RCX = TDR): says that every vCPU was flushed. None can run any more.
    ///
    /// # Errors
    /// Those of the TDR (RCX), which is busy while a vCPU runs; OPERAND_BUSY (KOT); LIFECYCLE_STATE_INCORRECT;
    /// FLUSHVP_NOT_DONE while a vCPU is associated with a logical processor.
    pub fn mng_vpflushdone(&self, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MngVpflushdone, || {
            let sole = self.td_alone(tdr, Operand::RCX)?;
            let td = sole.td();
            let mut kot = self.kot()?;
            if !matches!(td.lifecycle(), Lifecycle::HkidAssigned | Lifecycle::KeysConfigured) {
                return Err(Class::LIFECYCLE_STATE_INCORRECT.status().into());
            }
            if td.associated.load(Ordering::Acquire) != 0 {
                return Err(Class::FLUSHVP_NOT_DONE.status().into());
            }
            kot.flushed(td.hkid.load(Ordering::Relaxed));
            td.set_lifecycle(Lifecycle::Blocked);
            Ok(())
        })
    }

    /// TDH.MNG.KEY.FREEID (RCX = TDR): gives the TD's HKID back. Its pages can be reclaimed then.
    ///
    /// # Errors
    /// Those of the TDR (RCX); LIFECYCLE_STATE_INCORRECT; OPERAND_BUSY (KOT).
    pub fn mng_key_freeid(&self, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MngKeyFreeid, || {
            let sole = self.td_alone(tdr, Operand::RCX)?;
            let td = sole.td();
            if td.lifecycle() != Lifecycle::Blocked {
                return Err(Class::LIFECYCLE_STATE_INCORRECT.status().into());
            }
            self.kot()?.free(td.hkid.load(Ordering::Relaxed));
            td.set_lifecycle(Lifecycle::Teardown);
            Ok(())
        })
    }
}
