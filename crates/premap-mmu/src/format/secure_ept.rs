//! TDX's Secure-EPT as a host keeps it: a mirror of what the TDX module holds.
//!
//! The module alone writes the real table, and hardware never walks this one; its entries are spelled as EPT's (Intel SDM,
//! volume 3C, 30.3.2), so that a walk reads alike. Leaves are of 4 KiB or 2 MiB (TDH.MEM.PAGE.AUG takes levels 0 and 1),
//! always readable, writable and executable, and note no use: the module gives the host none of it. Hence there is no
//! [`TracksUse`](super::TracksUse) here.

use premap_address::{PageSize, Pfn};

use super::{Ept, Format};
use crate::attributes::{Attributes, Permissions, Use};

/// TDX's Secure-EPT, mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SecureEpt;

/// Private memory is always write-back.
const fn as_ept() -> Attributes<Ept> {
    Attributes {
        permissions: Permissions::ALL,
        memory: super::EptMemoryType::WriteBackForced,
        used: Use::NONE,
    }
}

impl Format for SecureEpt {
    type MemoryType = ();

    const NAME: &'static str = "Secure-EPT";
    const LARGEST: PageSize = PageSize::Size2M;
    const ABSENT: u64 = Ept::ABSENT;
    const ACCESSED: u64 = 0;
    const DIRTY: u64 = 0;
    const BREAK_BEFORE_MAKE: bool = false;

    fn is_present(raw: u64) -> bool {
        Ept::is_present(raw)
    }

    fn is_leaf(raw: u64, level: u8) -> bool {
        Ept::is_leaf(raw, level)
    }

    fn is_table(raw: u64) -> bool {
        Ept::is_table(raw)
    }

    fn table(frame: Pfn) -> u64 {
        Ept::table(frame)
    }

    fn leaf(frame: Pfn, size: PageSize, _: Attributes<Self>) -> u64 {
        Ept::leaf(frame, size, as_ept())
    }

    fn permissions(_: u64) -> Permissions {
        Permissions::ALL
    }

    fn memory(_: u64) {}

    fn write_protected(raw: u64) -> u64 {
        // The module has no such thing: what a TD may do with its memory is not the host's to say.
        raw
    }
}
