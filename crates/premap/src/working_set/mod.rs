//! Working sets: which guest memory a run touched, recorded from one and mapped first for the next.
//!
//! A [`WorkingSet`] is a list of guest ranges in the order of their first touch, as far as that could be told, each read or
//! written. It belongs to an image, by whatever [`Identity`] the VMM gives it: the guest that was recorded and the one that
//! it is used for must be the same, down to where things lie in memory. [`Recorder`] makes one, [`WorkingSet::first`] puts
//! a VM's memory into its order, and a [`Budget`](crate::Budget) of [`WorkingSet::bytes`] maps nothing else.
//!
//! ```no_run
//! use premap::working_set::{Identity, WorkingSet};
//! use premap::{Budget, Engine, Plan, Region};
//! # fn example(memory: &[Region], image: Identity, vcpus: &mut [premap_kvm::linux::Vcpu<std::os::fd::OwnedFd>])
//! # -> Result<(), Box<dyn std::error::Error>> {
//! let set = WorkingSet::decode(&std::fs::read("guest.premap")?)?;
//! let plan = Plan::new(set.first(&image, memory)?)?;
//! let budget = Budget { bytes: Some(set.bytes()), ..Budget::default() };
//! Engine::new().budget(budget).run(&plan, vcpus)?;
//! # Ok(())
//! # }
//! ```
//!
//! # The file
//!
//! All numbers are little-endian.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `premapWS` |
//! | 8 | 4 | version of this format: 1 |
//! | 12 | 4 | page size in bytes: 4 KiB, 2 MiB or 1 GiB; ranges start and end on such pages |
//! | 16 | 32 | identity of the image, as the VMM gave it |
//! | 48 | 8 | number of ranges |
//! | 56 | 16 each | first address, with bit 0 set where the guest wrote; length in bytes |
//! | end | 4 | CRC-32 (of IEEE 802.3) of all that comes before |
//!
//! Ranges do not overlap. They are in the order of first touch. The checksum tells damage, not malice; but whatever a file
//! holds, reading it gives a working set or an error, and using it can at worst map memory that is the VM's own.

mod error;
mod file;
mod order;
mod record;

use premap_address::{GpaRange, PageSize};

use crate::memory::Touch;

pub use error::{Malformed, Misfit, RecordError, WorkingSetError};
pub use record::{Method, Recorder};

/// What a working set was recorded of: 32 bytes of the VMM's choice, such as a SHA-256 of a kernel or the name of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Guest memory that was touched, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Which.
    pub range: GpaRange,
    /// Whether any of it was written, or all only read.
    pub touch: Touch,
}

/// The guest memory that a run touched, in the order of first touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    identity: Identity,
    page: PageSize,
    touched: Vec<Touched>,
}

impl WorkingSet {
    /// Makes a working set.
    ///
    /// # Errors
    /// A range that starts or ends inside a page, or two that overlap.
    pub fn new(identity: Identity, page: PageSize, touched: Vec<Touched>) -> Result<Self, WorkingSetError> {
        let mut sorted: Vec<_> = touched.iter().map(|touched| touched.range).collect();
        let cut = |range: &GpaRange| !range.start().is_aligned(page) || !range.end().is_aligned(page);
        if let Some(range) = sorted.iter().copied().find(cut) {
            return Err(WorkingSetError::CutsPage { range, page });
        }
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[1].start() < pair[0].end()) {
            return Err(WorkingSetError::Overlap { first: pair[0], second: pair[1] });
        }
        Ok(Self { identity, page, touched })
    }

    /// What it was recorded of.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The size of the pages that it is made of.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The ranges, in the order of first touch.
    #[must_use]
    pub fn touched(&self) -> &[Touched] {
        &self.touched
    }

    /// How much memory it is, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.touched.iter().fold(0, |sum, touched| sum.saturating_add(touched.range.bytes()))
    }
}
