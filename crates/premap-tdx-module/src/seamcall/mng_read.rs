//! MNG.RD: a TD's fields.

use premap_address::Hpa;
use premap_tdx::Digest;

use super::{Outcome, Seamcall};
use crate::Module;
use crate::status::Operand;
use crate::sync::Ordering;
use crate::td::exclusive;

/// A field that MNG.RD reads. By name: the model has no field codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TdField {
    /// TDR.LIFECYCLE_STATE.
    LifecycleState,
    /// TDR.CHLDCNT: 4 KiB pages that the TD has, its TDR left out.
    ChildCount,
    /// TDR.NUM_TDCX.
    TdcxPages,
    /// TDR.HKID.
    Hkid,
    /// TDCS.OP_STATE.
    OpState,
    /// TDCS.NUM_VCPUS.
    Vcpus,
    /// TDCS.NUM_ASSOC_VCPUS.
    AssociatedVcpus,
    /// TDCS.TD_EPOCH.
    Epoch,
    /// TDCS.ATTRIBUTES.
    Attributes,
    /// TDCS.XFAM.
    Xfam,
    /// TDCS.MAX_VCPUS.
    MaxVcpus,
    /// TDCS.GPAW: 1 if the shared bit is 51.
    Gpaw,
}

impl Module {
    /// TDH.MNG.RD (RCX = TDR): reads a field.
    ///
    /// # Errors
    /// Those of the TDR (RCX) and of a TD that is not ready, so nothing is read before MNG.INIT or after VPFLUSHDONE.
    pub fn mng_rd(&self, tdr: Hpa, field: TdField) -> Outcome<u64> {
        self.perform(Seamcall::MngRd, || {
            let admitted = self.td_shared(tdr, Operand::RCX)?.ready_for(Seamcall::MngRd)?;
            let td = admitted.td;
            let params = exclusive(&td.params).clone();
            Ok(match field {
                TdField::LifecycleState => td.lifecycle() as u64,
                TdField::ChildCount => td.children.sum(),
                TdField::TdcxPages => td.tdcx.load(Ordering::Relaxed),
                TdField::Hkid => td.hkid.load(Ordering::Relaxed),
                TdField::OpState => td.op_state() as u64,
                TdField::Vcpus => td.vcpus.load(Ordering::Relaxed),
                TdField::AssociatedVcpus => td.associated.load(Ordering::Relaxed),
                TdField::Epoch => td.epochs.current(),
                TdField::Attributes => params.attributes,
                TdField::Xfam => params.xfam,
                TdField::MaxVcpus => params.max_vcpus.into(),
                TdField::Gpaw => params.gpaw.into(),
            })
        })
    }

    /// TDH.MNG.RD of TDCS.MRTD: the measurement so far, or for good once MR.FINALIZE was called. Hardware gives the host this
    /// field of debug TDs only; of others a guest's report tells it ([`Guest::mrtd`](crate::Guest::mrtd)).
    ///
    /// # Errors
    /// As for [`mng_rd`](Self::mng_rd).
    pub fn mng_rd_mrtd(&self, tdr: Hpa) -> Outcome<Digest> {
        self.perform(Seamcall::MngRd, || {
            // A page that is added meanwhile has the TD alone, so the measurement stands still here.
            Ok(self.td_shared(tdr, Operand::RCX)?.ready_for(Seamcall::MngRd)?.td.mrtd())
        })
    }
}
