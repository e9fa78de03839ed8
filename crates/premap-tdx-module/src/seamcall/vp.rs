//! vCPUs: VP.CREATE, ADDCX, INIT, ENTER, FLUSH.

use premap_address::Hpa;

use super::{Outcome, Seamcall};
use crate::Module;
use crate::guest::Guest;
use crate::operand::Level;
use crate::pamt::{PageRecord, PageType};
use crate::status::{Class, Operand, Status};
use crate::sync::Ordering;
use crate::td::{MAX_TDVPS_PAGES, NO_PROCESSOR, TDVPS_PAGES, Td, Vcpu, exclusive};

/// A logical processor, by number. Whoever calls says on which one it is; no two threads are on one at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogicalProcessor(pub u32);

impl Module {
    /// TDH.VP.CREATE (RCX = page, RDX = TDR): makes a free page the TDVPR of a new vCPU.
    ///
    /// # Errors
    /// Those of the TDR (RDX) and of a TD that is not ready; those of the page (RCX).
    pub fn vp_create(&self, page: Hpa, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::VpCreate, || {
            let admitted = self.td_shared(tdr, Operand::RDX)?.ready_for(Seamcall::VpCreate)?;
            let (frame, claim) = self.claim_free(page, Operand::RCX)?;
            let control = self.control.get(frame).ok_or(Class::OPERAND_BUSY.on(Operand::RCX))?;
            control.vcpu_to_be().restart();
            admitted.td.children.add(1);
            claim.assign(PageRecord::of(PageType::Tdvpr, Level::PT, admitted.tdr));
            Ok(())
        })
    }

    /// TDH.VP.ADDCX (RCX = page, RDX = TDVPR): gives the vCPU a page for its control structure, of which it needs
    /// [`TDVPS_PAGES`] with its TDVPR.
    ///
    /// # Errors
    /// Those of the TDVPR (RDX); OPERAND_BUSY (TDR) and those of a TD that is not ready; VCPU_STATE_INCORRECT once it was
    /// initialised; TDCX_NUM_INCORRECT beyond 15 pages; those of the page (RCX).
    pub fn vp_addcx(&self, page: Hpa, tdvpr: Hpa) -> Outcome {
        self.perform(Seamcall::VpAddcx, || {
            let (_lock, vcpu, td) = self.vcpu(tdvpr, Operand::RDX)?;
            let admitted = td.ready_for(Seamcall::VpAddcx)?;
            if vcpu.is_ready() {
                return Err(Class::VCPU_STATE_INCORRECT.status().into());
            }
            let pages = vcpu.pages.load(Ordering::Relaxed);
            if pages >= MAX_TDVPS_PAGES {
                return Err(Class::TDCX_NUM_INCORRECT.status().into());
            }
            let (_, claim) = self.claim_free(page, Operand::RCX)?;
            vcpu.pages.store(pages + 1, Ordering::Relaxed);
            admitted.td.children.add(1);
            claim.assign(PageRecord::of(PageType::Tdcx, Level::PT, admitted.tdr));
            Ok(())
        })
    }

    /// TDH.VP.INIT (RCX = TDVPR, RDX = initial RCX, R8 = x2APIC id): initialises a vCPU and associates it with this processor.
    ///
    /// # Errors
    /// Those of the TDVPR (RCX); OPERAND_BUSY (TDR) and those of a TD that is not ready; TDCX_NUM_INCORRECT with too few
    /// pages; VCPU_STATE_INCORRECT if it was initialised; MAX_VCPUS_EXCEEDED.
    pub fn vp_init(&self, here: LogicalProcessor, tdvpr: Hpa, initial_rcx: u64, x2apic_id: u32) -> Outcome {
        self.perform(Seamcall::VpInit, || {
            let (_lock, vcpu, td) = self.vcpu(tdvpr, Operand::RCX)?;
            let admitted = td.ready_for(Seamcall::VpInit)?;
            let td = admitted.td;
            if vcpu.pages.load(Ordering::Relaxed) < TDVPS_PAGES {
                return Err(Class::TDCX_NUM_INCORRECT.status().into());
            }
            if vcpu.is_ready() {
                return Err(Class::VCPU_STATE_INCORRECT.status().into());
            }
            let most = u64::from(exclusive(&td.params).max_vcpus);
            let index = td.vcpus.fetch_update(Ordering::AcqRel, Ordering::Acquire, |vcpus| {
                (vcpus < most).then_some(vcpus + 1)
            });
            let index = index.map_err(|_| Class::MAX_VCPUS_EXCEEDED.status())?;
            vcpu.index.store(index, Ordering::Relaxed);
            vcpu.initial_rcx.store(initial_rcx, Ordering::Relaxed);
            vcpu.x2apic_id.store(x2apic_id.into(), Ordering::Relaxed);
            associate(td, vcpu, here)?;
            vcpu.set_ready();
            Ok(())
        })
    }

    /// TDH.VP.ENTER (RCX = TDVPR): runs a vCPU on this processor. What the guest does is `run`, which is given the guest's side
    /// of things; when it returns the vCPU has exited. Meanwhile the TD is shared and the vCPU takes part in a TLB epoch.
    ///
    /// # Errors
    /// Those of the TDVPR (RCX); OPERAND_BUSY (TDR) and those of a TD that is not ready; VCPU_STATE_INCORRECT before it was
    /// initialised; VCPU_ASSOCIATED if it is associated with another processor; OPERAND_BUSY (TD_EPOCH).
    pub fn vp_enter<R>(
        &self,
        here: LogicalProcessor,
        tdvpr: Hpa,
        run: impl FnOnce(&Guest<'_>) -> R,
    ) -> Outcome<R> {
        self.perform(Seamcall::VpEnter, || {
            let (_lock, vcpu, td) = self.vcpu(tdvpr, Operand::RCX)?;
            let admitted = td.ready_for(Seamcall::VpEnter)?;
            if !vcpu.is_ready() {
                return Err(Class::VCPU_STATE_INCORRECT.status().into());
            }
            associate(admitted.td, vcpu, here)?;
            let _epoch = admitted.td.epochs.enter()?;
            let admitted = admitted.release_op_state();
            Ok(run(&Guest::new(self, admitted.td, vcpu)))
        })
    }

    /// TDH.VP.FLUSH (RCX = TDVPR): takes the vCPU off this processor, so that it can run on another, or the TD end.
    ///
    /// # Errors
    /// Those of the TDVPR (RCX), which is busy while the vCPU runs; OPERAND_BUSY (TDR); TD_KEYS_NOT_CONFIGURED;
    /// TDCX_NUM_INCORRECT with too few pages; VCPU_NOT_ASSOCIATED.
    pub fn vp_flush(&self, here: LogicalProcessor, tdvpr: Hpa) -> Outcome {
        self.perform(Seamcall::VpFlush, || {
            let (_lock, vcpu, admitted) = self.vcpu(tdvpr, Operand::RCX)?;
            let td = admitted.td;
            if td.lifecycle() != crate::Lifecycle::KeysConfigured {
                return Err(Class::TD_KEYS_NOT_CONFIGURED.status().into());
            }
            if vcpu.pages.load(Ordering::Relaxed) < TDVPS_PAGES {
                return Err(Class::TDCX_NUM_INCORRECT.status().into());
            }
            if vcpu.processor.load(Ordering::Acquire) != u64::from(here.0) {
                return Err(Class::VCPU_NOT_ASSOCIATED.status().into());
            }
            vcpu.processor.store(NO_PROCESSOR, Ordering::Release);
            td.associated.fetch_sub(1, Ordering::AcqRel);
            Ok(())
        })
    }
}

/// Associates a vCPU with this processor, unless it is with another.
fn associate(td: &Td, vcpu: &Vcpu, here: LogicalProcessor) -> Result<(), Status> {
    match vcpu.processor.load(Ordering::Acquire) {
        NO_PROCESSOR => {
            vcpu.processor.store(here.0.into(), Ordering::Release);
            td.associated.fetch_add(1, Ordering::AcqRel);
            Ok(())
        }
        processor if processor == u64::from(here.0) => Ok(()),
        _ => Err(Class::VCPU_ASSOCIATED.status()),
    }
}
