//! The module: what all SEAMCALLs are made on.

use premap_address::Pfn;

use crate::config::{Config, ConfigError};
use crate::kot::Kot;
use crate::pamt::{PageRecord, Pamt};
use crate::phymem::{KeyIds, Page};
use crate::seamcall::Counters;
use crate::sparse::Sparse;
use crate::td::Control;

/// log2 of the pages whose bytes are made together: 64 KiB.
const MEMORY_GROUP: u32 = if cfg!(loom) { 0 } else { 4 };
/// The same of what says whether a page is a TD's or a vCPU's root.
const CONTROL_GROUP: u32 = crate::operand::INDEX_BITS;

/// The TDX module of a machine, and the machine's memory. Any number of threads call it at once.
#[derive(Debug)]
pub struct Module {
    pub(crate) memory: Sparse<Page>,
    pub(crate) pamt: Pamt,
    pub(crate) control: Sparse<Control>,
    pub(crate) keys: KeyIds,
    pub(crate) packages: u8,
    pub(crate) kot: Kot,
    pub(crate) counters: Counters,
    #[cfg(feature = "inject")]
    pub(crate) injection: crate::inject::Injection,
}

impl Module {
    /// Makes the module of a machine. All memory is the host's.
    ///
    /// # Errors
    /// There can be no such machine.
    pub fn new(config: &Config) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            memory: Sparse::new(&config.memory, MEMORY_GROUP),
            pamt: Pamt::new(&config.tdmrs, &config.reserved),
            control: Sparse::new(&config.tdmrs, CONTROL_GROUP),
            keys: config.keys.clone(),
            packages: config.packages,
            kot: Kot::new(&config.keys),
            counters: Counters::new(),
            #[cfg(feature = "inject")]
            injection: crate::inject::Injection::default(),
        })
    }

    /// The machine's HKIDs.
    #[must_use]
    pub fn keys(&self) -> &KeyIds {
        &self.keys
    }

    /// How many processor packages the machine has.
    #[must_use]
    pub fn packages(&self) -> u8 {
        self.packages
    }

    /// What the PAMT says of a page (TDH.PHYMEM.PAGE.RDMD), or `None` outside of TDMRs. Not counted as a call.
    #[must_use]
    pub fn page_record(&self, frame: Pfn) -> Option<PageRecord> {
        Some(self.pamt.entry(frame)?.record())
    }
}
