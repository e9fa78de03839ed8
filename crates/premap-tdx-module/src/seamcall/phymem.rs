//! The host's pages: PHYMEM.PAGE.RECLAIM, PHYMEM.PAGE.WBINVD.

use premap_address::{Hpa, PAGE_SIZE, Pfn};

use super::{Outcome, Seamcall};
use crate::Module;
use crate::operand::Level;
use crate::pamt::{PageRecord, PageType};
use crate::status::{Class, Operand};
use crate::td::{Lifecycle, unclaimable};

/// A page that was reclaimed: RCX, RDX and R8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reclaimed {
    /// What it was.
    pub kind: PageType,
    /// The TDR of the TD that had it; none if it was a TDR.
    pub owner: Option<Pfn>,
    /// Its size.
    pub level: Level,
}

impl Module {
    /// TDH.PHYMEM.PAGE.RECLAIM (RCX = page): takes a page of any kind from a TD in teardown; the TDR last.
    ///
    /// # Errors
    /// OPERAND_INVALID (RCX) for an address that is unaligned, also to the size of the page that is there;
    /// OPERAND_ADDR_RANGE_ERROR (RCX); PAGE_METADATA_INCORRECT (RCX) for a page that nobody has; OPERAND_BUSY (RCX, TDR);
    /// LIFECYCLE_STATE_INCORRECT; TD_ASSOCIATED_PAGES_EXIST for a TDR that is not the last.
    pub fn phymem_page_reclaim(&self, page: Hpa) -> Outcome<Reclaimed> {
        self.perform(Seamcall::PhymemPageReclaim, || {
            let (frame, entry) = self.given_page(page, Operand::RCX, PAGE_SIZE)?;
            let owned = |record: PageRecord| !matches!(record.kind, PageType::Nda | PageType::Reserved);
            let head = entry.claim(owned).map_err(|error| unclaimable(error, Operand::RCX))?;
            let PageRecord { kind, level, owner } = head.record();
            if !page.raw().is_multiple_of(level.bytes()) {
                return Err(Class::OPERAND_INVALID.on(Operand::RCX).into());
            }
            if kind == PageType::Tdr {
                let td = self.control.get(frame).and_then(crate::td::Control::td);
                let td = td.ok_or(Class::PAGE_METADATA_INCORRECT.on(Operand::RCX))?;
                let _lock = td.lock.try_exclusive().ok_or(Class::OPERAND_BUSY.on(Operand::RCX))?;
                if td.lifecycle() != Lifecycle::Teardown {
                    return Err(Class::LIFECYCLE_STATE_INCORRECT.status().into());
                }
                if td.children.sum() != 0 {
                    return Err(Class::TD_ASSOCIATED_PAGES_EXIST.status().into());
                }
                head.release();
                return Ok(Reclaimed { kind, owner: None, level });
            }
            let td = self.td_of(owner)?;
            if td.td.lifecycle() != Lifecycle::Teardown {
                return Err(Class::LIFECYCLE_STATE_INCORRECT.status().into());
            }
            let same = |record| record == PageRecord { kind, level, owner };
            let run = self.pamt.claim_rest(head, frame, level, same);
            run.map_err(|error| unclaimable(error, Operand::RCX))?.release();
            td.td.children.sub(level.pages());
            Ok(Reclaimed { kind, owner, level })
        })
    }

    /// TDH.PHYMEM.PAGE.WBINVD (RCX = page, with the HKID whose cache lines are meant): writes a free page's cache lines back.
    /// The model has no caches; the checks are those of hardware.
    ///
    /// # Errors
    /// OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY, or PAGE_METADATA_INCORRECT for a page that a TD has; all RCX.
    pub fn phymem_page_wbinvd(&self, page: Hpa) -> Outcome {
        self.perform(Seamcall::PhymemPageWbinvd, || {
            let (address, _) = self.keys.split(page).ok_or(Class::OPERAND_INVALID.on(Operand::RCX))?;
            drop(self.claim_free(address, Operand::RCX)?);
            Ok(())
        })
    }
}
