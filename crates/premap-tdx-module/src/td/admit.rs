//! The beginning of every call on a TD: which TD, its lock, and whether it is ready for the call.
//!
//! In this order: the TDR's address (OPERAND_INVALID), its TDMR (OPERAND_ADDR_RANGE_ERROR), its type
//! (PAGE_METADATA_INCORRECT), its lock (OPERAND_BUSY); TD_FATAL, TD_KEYS_NOT_CONFIGURED, TDCS_NOT_ALLOCATED; the lock of
//! OP_STATE, and OP_STATE_INCORRECT.

use premap_address::{Hpa, PAGE_SIZE, Pfn};

use super::{Td, Vcpu};
use crate::Module;
use crate::locks::{Exclusive, Shared};
use crate::operand::Level;
use crate::pamt::{Claim, Entry, PageType, Run, Unclaimable};
use crate::seamcall::Seamcall;
use crate::status::{Class, Operand, Status};

/// A TD that other calls may work on at the same time.
#[derive(Debug)]
pub(crate) struct Admitted<'m> {
    pub(crate) td: &'m Td,
    pub(crate) tdr: Pfn,
    _op_state: Option<Shared<'m>>,
    _tdr: Shared<'m>,
}

/// A TD that no other call works on.
#[derive(Debug)]
pub(crate) struct Sole<'m> {
    td: &'m Td,
    pub(crate) tdr: Pfn,
    _tdr: Exclusive<'m>,
}

impl<'m> Admitted<'m> {
    /// Checks that the TD is ready for the call, and keeps its OP_STATE.
    #[inline]
    pub(crate) fn ready_for(mut self, call: Seamcall) -> Result<Self, Status> {
        self.td.check_built()?;
        let op_state = self.td.op_state_lock.try_shared();
        self._op_state = Some(op_state.ok_or(Class::OPERAND_BUSY.on(Operand::OP_STATE))?);
        check_op_state(self.td, call)?;
        Ok(self)
    }

    /// Lets OP_STATE go and keeps the TD, as while a vCPU runs.
    pub(crate) fn release_op_state(mut self) -> Self {
        self._op_state = None;
        self
    }
}

impl Sole<'_> {
    /// The TD, for as long as it is held.
    pub(crate) fn td(&self) -> &Td {
        self.td
    }

    /// Checks that the TD is ready for the call. Nobody can change its OP_STATE meanwhile.
    pub(crate) fn ready_for(self, call: Seamcall) -> Result<Self, Status> {
        self.td.check_built()?;
        check_op_state(self.td, call)?;
        Ok(self)
    }
}

#[inline]
fn check_op_state(td: &Td, call: Seamcall) -> Result<(), Status> {
    let state = td.op_state();
    if call.op_states().contain(state) { Ok(()) } else { Err(Class::OP_STATE_INCORRECT.with(state as u32)) }
}

impl Module {
    /// The PAMT entry of a page that the caller gave: aligned, without HKID, in a TDMR.
    #[inline]
    pub(crate) fn given_page(&self, hpa: Hpa, operand: Operand, bytes: u64) -> Result<(Pfn, &Entry), Status> {
        let frame = self.keys.private_page(hpa, bytes).ok_or(Class::OPERAND_INVALID.on(operand))?;
        let entry = self.pamt.entry(frame).ok_or(Class::OPERAND_ADDR_RANGE_ERROR.on(operand))?;
        Ok((frame, entry))
    }

    /// Takes a free 4 KiB page that the caller gave.
    #[inline]
    pub(crate) fn claim_free(&self, hpa: Hpa, operand: Operand) -> Result<(Pfn, Claim<'_>), Status> {
        let (frame, entry) = self.given_page(hpa, operand, PAGE_SIZE)?;
        let claim = entry.claim(|record| record.kind == PageType::Nda);
        Ok((frame, claim.map_err(|error| unclaimable(error, operand))?))
    }

    /// Takes free pages of any size that the caller gave.
    #[inline]
    pub(crate) fn claim_free_run(
        &self,
        hpa: Hpa,
        level: Level,
        operand: Operand,
    ) -> Result<(Pfn, Run<'_>), Status> {
        let (frame, _) = self.given_page(hpa, operand, level.bytes())?;
        if level > Level::PT && !self.pamt.covers(frame, level.pages()) {
            return Err(Class::OPERAND_ADDR_RANGE_ERROR.on(operand));
        }
        let run = self.pamt.claim_run(frame, level, |record| record.kind == PageType::Nda);
        Ok((frame, run.map_err(|error| unclaimable(error, operand))?))
    }

    fn tdr(&self, hpa: Hpa, operand: Operand) -> Result<(Pfn, &Td), Status> {
        let (frame, entry) = self.given_page(hpa, operand, PAGE_SIZE)?;
        let td = self.control.get(frame).and_then(super::Control::td);
        let td = td.filter(|_| entry.record().kind == PageType::Tdr);
        Ok((frame, td.ok_or(Class::PAGE_METADATA_INCORRECT.on(operand))?))
    }

    /// Whether the page still is a TDR, now that its lock is held.
    fn still_tdr(&self, frame: Pfn) -> bool {
        self.pamt.entry(frame).is_some_and(|entry| entry.record().kind == PageType::Tdr)
    }

    /// The TD whose TDR the caller gave, shared with other calls.
    #[inline]
    pub(crate) fn td_shared(&self, hpa: Hpa, operand: Operand) -> Result<Admitted<'_>, Status> {
        let (tdr, td) = self.tdr(hpa, operand)?;
        let lock = td.lock.try_shared().ok_or(Class::OPERAND_BUSY.on(operand))?;
        if !self.still_tdr(tdr) {
            return Err(Class::PAGE_METADATA_INCORRECT.on(operand));
        }
        Ok(Admitted { td, tdr, _op_state: None, _tdr: lock })
    }

    /// The TD whose TDR the caller gave, for this call alone.
    pub(crate) fn td_alone(&self, hpa: Hpa, operand: Operand) -> Result<Sole<'_>, Status> {
        let (tdr, td) = self.tdr(hpa, operand)?;
        let lock = td.lock.try_exclusive().ok_or(Class::OPERAND_BUSY.on(operand))?;
        if !self.still_tdr(tdr) {
            return Err(Class::PAGE_METADATA_INCORRECT.on(operand));
        }
        Ok(Sole { td, tdr, _tdr: lock })
    }

    /// The TD that has a page, shared with other calls.
    pub(crate) fn td_of(&self, owner: Option<Pfn>) -> Result<Admitted<'_>, Status> {
        let busy = Class::OPERAND_BUSY.on(Operand::TDR);
        let tdr = owner.ok_or(busy)?;
        // A page's owner stays a TDR until the page is reclaimed, which needs the page's entry or the vCPU's lock.
        let td = self.control.get(tdr).and_then(super::Control::td).ok_or(busy)?;
        let lock = td.lock.try_shared().ok_or(busy)?;
        Ok(Admitted { td, tdr, _op_state: None, _tdr: lock })
    }

    /// The vCPU whose TDVPR the caller gave, for this call alone, and its TD.
    pub(crate) fn vcpu(
        &self,
        hpa: Hpa,
        operand: Operand,
    ) -> Result<(Exclusive<'_>, &Vcpu, Admitted<'_>), Status> {
        let (frame, entry) = self.given_page(hpa, operand, PAGE_SIZE)?;
        let is_vcpu = || Some(entry.record()).filter(|record| record.kind == PageType::Tdvpr);
        let incorrect = Class::PAGE_METADATA_INCORRECT.on(operand);
        let vcpu = self.control.get(frame).and_then(super::Control::vcpu).filter(|_| is_vcpu().is_some());
        let vcpu = vcpu.ok_or(incorrect)?;
        let lock = vcpu.lock.try_exclusive().ok_or(Class::OPERAND_BUSY.on(operand))?;
        let owner = is_vcpu().ok_or(incorrect)?.owner;
        let td = self.td_of(owner)?;
        // With the TD held its pages stay its own; before that, this one may have been reclaimed.
        if is_vcpu().is_none_or(|record| record.owner != owner) {
            return Err(incorrect);
        }
        Ok((lock, vcpu, td))
    }
}

/// What a call says of a page that it could not take.
pub(crate) fn unclaimable(error: Unclaimable, operand: Operand) -> Status {
    match error {
        Unclaimable::Incorrect => Class::PAGE_METADATA_INCORRECT.on(operand),
        Unclaimable::Busy => Class::OPERAND_BUSY.on(operand),
    }
}
