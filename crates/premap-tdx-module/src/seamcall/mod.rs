//! The SEAMCALLs, by what they are about: a TD as a whole (`mng`), its vCPUs (`vp`), its memory (`mem`), its measurement
//! (`mr`), the host's pages (`phymem`).
//!
//! Each is a method of [`Module`](crate::Module), named as the call, that takes what the registers hold and gives what they hold afterwards.
//! All go through `Module::perform`, which counts them and fails those that a test wants to fail.

mod count;
mod mem_add;
mod mem_block;
mod mem_entry;
mod mem_relocate;
mod mem_remove;
mod mem_resize;
mod mng;
mod mng_end;
mod mng_read;
mod mr;
mod outcome;
mod phymem;
mod vp;

pub use count::{Count, Counts};
pub use mem_add::{Source, Table};
pub use mng::Package;
pub use mng_read::TdField;
pub use outcome::{EntryInfo, Failure, Outcome};
pub use phymem::Reclaimed;
pub use vp::LogicalProcessor;

pub(crate) use count::Counters;

/// A SEAMCALL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Seamcall {
    /// Makes a page the root of a new TD.
    MngCreate,
    /// Gives a TD a page for its control structure.
    MngAddcx,
    /// Configures a TD's key on a package.
    MngKeyConfig,
    /// Initialises a TD from TD_PARAMS.
    MngInit,
    /// Reads a field of a TD.
    MngRd,
    /// Ends a TD's running.
    MngVpflushdone,
    /// Frees a TD's HKID.
    MngKeyFreeid,
    /// Makes a page the root of a new vCPU.
    VpCreate,
    /// Gives a vCPU a page for its control structure.
    VpAddcx,
    /// Initialises a vCPU.
    VpInit,
    /// Runs a vCPU.
    VpEnter,
    /// Takes a vCPU off its logical processor.
    VpFlush,
    /// Adds a Secure-EPT table.
    MemSeptAdd,
    /// Reads a Secure-EPT entry.
    MemSeptRd,
    /// Removes an empty Secure-EPT table.
    MemSeptRemove,
    /// Adds a page with content, before the measurement is final.
    MemPageAdd,
    /// Adds a page that the guest must accept.
    MemPageAug,
    /// Moves a page to another place in the host's memory.
    MemPageRelocate,
    /// Makes the pages of a table one larger page.
    MemPagePromote,
    /// Splits a page into the pages of a table.
    MemPageDemote,
    /// Takes a page from a TD.
    MemPageRemove,
    /// Blocks new translations through an entry.
    MemRangeBlock,
    /// Takes a block back.
    MemRangeUnblock,
    /// Starts the next TLB epoch.
    MemTrack,
    /// Measures 256 bytes.
    MrExtend,
    /// Ends the measurement; the TD can run.
    MrFinalize,
    /// Takes a page from a TD in teardown.
    PhymemPageReclaim,
    /// Writes a page's cache lines back.
    PhymemPageWbinvd,
}

impl Seamcall {
    /// Every SEAMCALL that is modelled.
    pub const ALL: [Self; 28] = [
        Self::MngCreate,
        Self::MngAddcx,
        Self::MngKeyConfig,
        Self::MngInit,
        Self::MngRd,
        Self::MngVpflushdone,
        Self::MngKeyFreeid,
        Self::VpCreate,
        Self::VpAddcx,
        Self::VpInit,
        Self::VpEnter,
        Self::VpFlush,
        Self::MemSeptAdd,
        Self::MemSeptRd,
        Self::MemSeptRemove,
        Self::MemPageAdd,
        Self::MemPageAug,
        Self::MemPageRelocate,
        Self::MemPagePromote,
        Self::MemPageDemote,
        Self::MemPageRemove,
        Self::MemRangeBlock,
        Self::MemRangeUnblock,
        Self::MemTrack,
        Self::MrExtend,
        Self::MrFinalize,
        Self::PhymemPageReclaim,
        Self::PhymemPageWbinvd,
    ];

    /// The name, as in the specification.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MngCreate => "TDH.MNG.CREATE",
            Self::MngAddcx => "TDH.MNG.ADDCX",
            Self::MngKeyConfig => "TDH.MNG.KEY.CONFIG",
            Self::MngInit => "TDH.MNG.INIT",
            Self::MngRd => "TDH.MNG.RD",
            Self::MngVpflushdone => "TDH.MNG.VPFLUSHDONE",
            Self::MngKeyFreeid => "TDH.MNG.KEY.FREEID",
            Self::VpCreate => "TDH.VP.CREATE",
            Self::VpAddcx => "TDH.VP.ADDCX",
            Self::VpInit => "TDH.VP.INIT",
            Self::VpEnter => "TDH.VP.ENTER",
            Self::VpFlush => "TDH.VP.FLUSH",
            Self::MemSeptAdd => "TDH.MEM.SEPT.ADD",
            Self::MemSeptRd => "TDH.MEM.SEPT.RD",
            Self::MemSeptRemove => "TDH.MEM.SEPT.REMOVE",
            Self::MemPageAdd => "TDH.MEM.PAGE.ADD",
            Self::MemPageAug => "TDH.MEM.PAGE.AUG",
            Self::MemPageRelocate => "TDH.MEM.PAGE.RELOCATE",
            Self::MemPagePromote => "TDH.MEM.PAGE.PROMOTE",
            Self::MemPageDemote => "TDH.MEM.PAGE.DEMOTE",
            Self::MemPageRemove => "TDH.MEM.PAGE.REMOVE",
            Self::MemRangeBlock => "TDH.MEM.RANGE.BLOCK",
            Self::MemRangeUnblock => "TDH.MEM.RANGE.UNBLOCK",
            Self::MemTrack => "TDH.MEM.TRACK",
            Self::MrExtend => "TDH.MR.EXTEND",
            Self::MrFinalize => "TDH.MR.FINALIZE",
            Self::PhymemPageReclaim => "TDH.PHYMEM.PAGE.RECLAIM",
            Self::PhymemPageWbinvd => "TDH.PHYMEM.PAGE.WBINVD",
        }
    }

    /// The leaf number: RAX of the SEAMCALL.
    #[must_use]
    pub const fn leaf(self) -> u64 {
        match self {
            Self::MngCreate => 9,
            Self::MngAddcx => 1,
            Self::MngKeyConfig => 8,
            Self::MngInit => 21,
            Self::MngRd => 11,
            Self::MngVpflushdone => 19,
            Self::MngKeyFreeid => 20,
            Self::VpCreate => 10,
            Self::VpAddcx => 4,
            Self::VpInit => 22,
            Self::VpEnter => 0,
            Self::VpFlush => 18,
            Self::MemSeptAdd => 3,
            Self::MemSeptRd => 25,
            Self::MemSeptRemove => 30,
            Self::MemPageAdd => 2,
            Self::MemPageAug => 6,
            Self::MemPageRelocate => 5,
            Self::MemPagePromote => 23,
            Self::MemPageDemote => 15,
            Self::MemPageRemove => 29,
            Self::MemRangeBlock => 7,
            Self::MemRangeUnblock => 39,
            Self::MemTrack => 38,
            Self::MrExtend => 16,
            Self::MrFinalize => 17,
            Self::PhymemPageReclaim => 28,
            Self::PhymemPageWbinvd => 41,
        }
    }
}

impl std::fmt::Display for Seamcall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
