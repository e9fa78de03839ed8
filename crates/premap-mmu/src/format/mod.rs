//! Page-table formats: how a table entry is spelled.
//!
//! Every format here has 512 entries of 8 bytes a table, a 4 KiB granule, and leaves at levels 1 to 3:
//!
//! ```text
//!  56     48 47     39 38     30 29     21 20     12 11         0
//! +---------+---------+---------+---------+---------+------------+
//! | level 5 | level 4 | level 3 | level 2 | level 1 |   offset   |
//! +---------+---------+---------+---------+---------+------------+
//!                      1 GiB leaf 2 MiB leaf 4 KiB leaf
//! ```
//!
//! A format says what hardware sees. What only software sees it leaves to the protocol module: bit 55 of a present entry and
//! bits 56 and 57 of one that is not present are free in all formats, and the protocol uses them.

mod arm64;
mod ept;
mod npt;
mod secure_ept;

use core::fmt::Debug;
use core::hash::Hash;

use premap_address::{PageSize, Pfn};

pub use arm64::{Arm64MemoryType, Arm64Stage2};
pub use ept::{Ept, EptMemoryType};
pub use npt::{Npt, NptMemoryType};
pub use secure_ept::SecureEpt;

use crate::attributes::{Access, Attributes, Permissions, Use};

/// Bits 51:12, where x86's formats have the address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A page-table format: the bits of tables and leaves.
///
/// Entries pass as raw words; all that holds a raw word got it from this format. A format that can't note use does not
/// implement [`TracksUse`], and the operations that need it then do not exist.
pub trait Format: Copy + Debug + Eq + Hash + Send + Sync + 'static {
    /// How a leaf says its cacheability. The default is ordinary write-back memory.
    type MemoryType: Copy + Debug + Default + Eq + Hash + Send + Sync + 'static;

    /// The format's name, for reports.
    const NAME: &'static str;
    /// The largest leaf.
    const LARGEST: PageSize;
    /// The word of an entry that maps nothing.
    const ABSENT: u64;
    /// The bit of a leaf that says that it was touched; zero where there is none.
    const ACCESSED: u64;
    /// The bit of a leaf that says that it was written; zero where there is none.
    const DIRTY: u64;
    /// The bits of a leaf that the processor sets by itself.
    const USE_BITS: u64 = Self::ACCESSED | Self::DIRTY;
    /// Whether a present entry may change its size or its frame only through an entry that is not present and a flush
    /// (Arm's break-before-make).
    const BREAK_BEFORE_MAKE: bool;

    /// Whether the processor would follow or use the entry.
    fn is_present(raw: u64) -> bool;

    /// Whether a present entry of this level is a leaf.
    fn is_leaf(raw: u64, level: u8) -> bool;

    /// Whether an entry of level 2 and above points to a table. All tables are spelled as [`table`](Self::table) does.
    #[must_use]
    fn is_table(raw: u64) -> bool {
        // A leaf of level 2 and one of level 3 are spelled alike in every format.
        Self::is_present(raw) && !Self::is_leaf(raw, 2)
    }

    /// The entry that points to a table.
    fn table(frame: Pfn) -> u64;

    /// The entry that maps a leaf.
    fn leaf(frame: Pfn, size: PageSize, attributes: Attributes<Self>) -> u64;

    /// What a leaf permits.
    fn permissions(raw: u64) -> Permissions;

    /// How a leaf says its memory is cached.
    fn memory(raw: u64) -> Self::MemoryType;

    /// What a leaf says besides its frame.
    #[must_use]
    fn attributes(raw: u64, _size: PageSize) -> Attributes<Self> {
        let used = Use { accessed: raw & Self::ACCESSED != 0, dirty: raw & Self::DIRTY != 0 };
        Attributes { permissions: Self::permissions(raw), memory: Self::memory(raw), used }
    }

    /// The leaf after the processor used it so, or `None` if it does not permit that.
    #[must_use]
    fn touch(raw: u64, access: Access) -> Option<u64> {
        let noted = if access == Access::Write { Self::ACCESSED | Self::DIRTY } else { Self::ACCESSED };
        Self::permissions(raw).permits(access).then_some(raw | noted)
    }

    /// The leaf as not written, with later writes noted or refused as its format can.
    #[must_use]
    fn clean(raw: u64) -> u64 {
        raw & !Self::DIRTY
    }

    /// The leaf as not touched.
    #[must_use]
    fn old(raw: u64) -> u64 {
        raw & !Self::ACCESSED
    }

    /// The leaf without the permission to write.
    fn write_protected(raw: u64) -> u64;

    /// The frame that a table entry or a leaf of this size points to.
    #[must_use]
    fn frame(raw: u64, size: PageSize) -> Pfn {
        Pfn::new((raw & ADDRESS) >> premap_address::PAGE_SHIFT).align_down(size)
    }
}

/// A format whose processor notes in leaves that they were touched and written.
pub trait TracksUse: Format {}

/// The bits that say a use.
const fn use_bits<F: Format>(used: Use) -> u64 {
    let accessed = if used.accessed { F::ACCESSED } else { 0 };
    let dirty = if used.dirty { F::DIRTY } else { 0 };
    accessed | dirty
}

/// The index of an address in a table of a level.
pub(crate) const fn index(gpa: premap_address::Gpa, level: u8) -> usize {
    ((gpa.raw() >> shift(level)) & 511) as usize
}

/// log2 of what one entry of a level spans, in bytes.
pub(crate) const fn shift(level: u8) -> u32 {
    premap_address::PAGE_SHIFT + 9 * (level as u32 - 1)
}

/// The page size of a leaf at a level, or `None` where the level has no leaves.
pub(crate) const fn leaf_size(level: u8) -> Option<PageSize> {
    match level {
        1 => Some(PageSize::Size4K),
        2 => Some(PageSize::Size2M),
        3 => Some(PageSize::Size1G),
        _ => None,
    }
}
