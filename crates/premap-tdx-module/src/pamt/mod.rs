//! The physical address metadata table: what each page of the TDMRs is, and whose.
//!
//! # One entry a page
//!
//! The module keeps entries for 1 GiB, 2 MiB and 4 KiB pages, and locks them from the top down. Here every 4 KiB page has one
//! entry, an atomic word that says type, owner, the size of the page that it is part of, and whether a call has it locked;
//! beside it the epoch in which it was blocked. A large page is as many entries that say so, claimed one after the other,
//! all or none. Statuses are the same; what differs is that calls on single pages write no word that another page's call
//! writes.
//!
//! # Rules
//!
//! * Who changes an entry has [claimed](Claim) it. A claim is tried and never waited for, but for a host's access to the
//!   page's bytes, which takes a moment and waits for nothing.
//! * **Free means NDA.** A page is taken for a TD from NDA only, and goes back to NDA when it is removed or reclaimed. It is
//!   then *stale*: it holds a TD's bytes until the host or another TD has overwritten them.
//!
//! Source: Intel TDX Module 1.5 base specification, physical memory management; page types from its ABI specification.

mod entry;
mod run;

use premap_address::Pfn;

use crate::phymem::HpaRange;
use crate::sparse::Sparse;

pub(crate) use entry::{Claim, Entry, Unclaimable};
pub use entry::{PageRecord, PageType};
pub(crate) use run::Run;

/// log2 of the pages whose entries are made together: those of a page of 2 MiB.
const GROUP: u32 = crate::operand::INDEX_BITS;

/// The entries of all pages in TDMRs.
#[derive(Debug)]
pub(crate) struct Pamt {
    entries: Sparse<Entry>,
}

impl Pamt {
    pub(crate) fn new(tdmrs: &[HpaRange], reserved: &[HpaRange]) -> Self {
        let new = Self { entries: Sparse::new(tdmrs, GROUP) };
        for frame in reserved.iter().flat_map(|range| range.frames()) {
            if let Some(entry) = new.entry(frame) {
                entry.reserve();
            }
        }
        new
    }

    /// The page's entry, or `None` outside of TDMRs.
    #[inline]
    pub(crate) fn entry(&self, frame: Pfn) -> Option<&Entry> {
        self.entries.get(frame)
    }

    /// Whether all of these pages are in TDMRs.
    pub(crate) fn covers(&self, first: Pfn, pages: u64) -> bool {
        (0..pages).all(|page| first.checked_add(page).is_some_and(|frame| self.entry(frame).is_some()))
    }
}
