//! A TD's beginning: MNG.CREATE, KEY.CONFIG, ADDCX, INIT.

use premap_address::{Hpa, PAGE_SIZE};

use super::{Outcome, Seamcall};
use crate::Module;
use crate::operand::Level;
use crate::pamt::{PageRecord, PageType};
use crate::phymem::Hkid;
use crate::sept::clear_table;
use crate::status::{Class, Operand, Status};
use crate::sync::Ordering;
use crate::td::{Lifecycle, MAX_TDCS_PAGES, Measured, OpState, ROOT_TDCX, TDCS_PAGES, TdParams, exclusive};

/// A processor package, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Package(pub u8);

impl Module {
    /// TDH.MNG.CREATE (RCX = page, RDX = HKID): makes a free page the TDR of a new TD with a free private HKID.
    ///
    /// # Errors
    /// OPERAND_INVALID (RDX) for an HKID that is not private; OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR,
    /// PAGE_METADATA_INCORRECT or OPERAND_BUSY (RCX) for the page; OPERAND_BUSY (KOT); HKID_NOT_FREE.
    pub fn mng_create(&self, page: Hpa, hkid: Hkid) -> Outcome {
        self.perform(Seamcall::MngCreate, || {
            if !self.keys.private.contains(&hkid.0) {
                return Err(Class::OPERAND_INVALID.on(Operand::RDX).into());
            }
            let (tdr, claim) = self.claim_free(page, Operand::RCX)?;
            let busy = Class::OPERAND_BUSY.on(Operand::RCX);
            let td = self.control.get(tdr).ok_or(busy)?.td_to_be();
            // Held only by a call that took the page for the TDR that it was a moment ago.
            let _lock = td.lock.try_exclusive().ok_or(busy)?;
            self.kot()?.assign(hkid)?;
            td.restart(hkid.0);
            claim.assign(PageRecord { kind: PageType::Tdr, level: Level::PT, owner: None });
            Ok(())
        })
    }

    /// TDH.MNG.KEY.CONFIG (RCX = TDR) on a processor of a package. When it was done on every package the TD's keys are
    /// configured.
    ///
    /// # Errors
    /// Those of the TDR (RCX); TD_FATAL; LIFECYCLE_STATE_INCORRECT; KEY_CONFIGURED, if it was done on this package.
    ///
    /// # Panics
    /// The package is none of the machine's.
    #[track_caller]
    pub fn mng_key_config(&self, tdr: Hpa, package: Package) -> Outcome {
        assert!(package.0 < self.packages, "{package:?} of a machine with {}", self.packages);
        self.perform(Seamcall::MngKeyConfig, || {
            let sole = self.td_alone(tdr, Operand::RCX)?;
            let td = sole.td();
            if td.is_fatal() {
                return Err(Class::TD_FATAL.status().into());
            }
            if td.lifecycle() != Lifecycle::HkidAssigned {
                return Err(Class::LIFECYCLE_STATE_INCORRECT.status().into());
            }
            let bit = 1 << package.0;
            let configured = td.packages.load(Ordering::Acquire);
            if configured & bit != 0 {
                return Err(Class::KEY_CONFIGURED.status().into());
            }
            td.packages.store(configured | bit, Ordering::Release);
            if (configured | bit).count_ones() == u32::from(self.packages) {
                td.set_lifecycle(Lifecycle::KeysConfigured);
            }
            Ok(())
        })
    }

    /// TDH.MNG.ADDCX (RCX = page, RDX = TDR): gives the TD a page for its control structure, [`TDCS_PAGES`] of which it
    /// needs. The fourth is the root of its Secure-EPT.
    ///
    /// # Errors
    /// Those of the TDR (RDX); TD_FATAL; TD_KEYS_NOT_CONFIGURED; TDCX_NUM_INCORRECT beyond nine pages; those of the page
    /// (RCX); OP_STATE_INCORRECT.
    pub fn mng_addcx(&self, page: Hpa, tdr: Hpa) -> Outcome {
        self.perform(Seamcall::MngAddcx, || {
            let sole = self.td_alone(tdr, Operand::RDX)?;
            let td = sole.td();
            td.check_keys()?;
            let pages = td.tdcx.load(Ordering::Acquire);
            if pages >= MAX_TDCS_PAGES {
                return Err(Class::TDCX_NUM_INCORRECT.status().into());
            }
            let (frame, claim) = self.claim_free(page, Operand::RCX)?;
            let state = td.op_state();
            if pages >= TDCS_PAGES && !Seamcall::MngAddcx.op_states().contain(state) {
                return Err(Class::OP_STATE_INCORRECT.with(state as u32).into());
            }
            if pages == ROOT_TDCX {
                clear_table(self.backing(frame, Operand::RCX)?);
                td.set_root(frame);
            }
            td.tdcx.store(pages + 1, Ordering::Release);
            td.children.add(1);
            claim.assign(PageRecord::of(PageType::Tdcx, Level::PT, sole.tdr));
            Ok(())
        })
    }

    /// TDH.MNG.INIT (RCX = TDR, RDX = TD_PARAMS): reads the TD's parameters from the host's memory, 1,024 bytes aligned to as
    /// many, and starts its measurement.
    ///
    /// # Errors
    /// Those of the TDR (RCX) and of a TD that is not ready; OPERAND_INVALID (RDX) for the address, or with the field of
    /// TD_PARAMS that can't be right.
    pub fn mng_init(&self, tdr: Hpa, td_params: Hpa) -> Outcome {
        self.perform(Seamcall::MngInit, || {
            let sole = self.td_alone(tdr, Operand::RCX)?.ready_for(Seamcall::MngInit)?;
            let td = sole.td();
            let invalid = Class::OPERAND_INVALID.on(Operand::RDX);
            let address = self.keys.shared(td_params, TdParams::BYTES as u64).ok_or(invalid)?;
            let page = self.page_as_host_sees_it(address.frame()).ok_or(invalid)?;
            let offset = (address.raw() % PAGE_SIZE) as usize;
            let bytes = page[offset..].first_chunk().ok_or(invalid)?;
            td.configure(TdParams::from_bytes(bytes).map_err(Status::from)?);
            td.epochs.reset();
            *exclusive(&td.measured) = Measured::Running(Box::default());
            td.set_op_state(OpState::Initialized);
            Ok(())
        })
    }
}
