//! AMD's nested page tables: long-mode tables walked as user accesses. Bits from the AMD64 APM, volume 2, 5.3.3, 5.4.1
//! and 15.25.5 (every nested walk is a user access, so leaves and tables have U/S set).

use premap_address::{PageSize, Pfn};

use super::{Format, TracksUse, use_bits};
use crate::attributes::{Attributes, Permissions};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Bits 3 and 4 choose from the host's PAT: PWT and PCD.
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// Bit 7 of an entry of level 2 or 3; at level 1 it is the PAT bit, which is never set here.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// AMD's nested page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Npt;

/// The memory type of a nested leaf, through the power-on PAT (APM 7.8.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NptMemoryType {
    /// PAT entry 0: write-back.
    #[default]
    WriteBack,
    /// PAT entry 1: write-through.
    WriteThrough,
    /// PAT entry 3: uncacheable.
    Uncacheable,
}

impl NptMemoryType {
    const fn bits(self) -> u64 {
        match self {
            Self::WriteBack => 0,
            Self::WriteThrough => WRITE_THROUGH,
            Self::Uncacheable => WRITE_THROUGH | CACHE_DISABLE,
        }
    }

    const fn from_bits(raw: u64) -> Self {
        if raw & CACHE_DISABLE != 0 {
            Self::Uncacheable
        } else if raw & WRITE_THROUGH != 0 {
            Self::WriteThrough
        } else {
            Self::WriteBack
        }
    }
}

impl Format for Npt {
    type MemoryType = NptMemoryType;

    const NAME: &'static str = "NPT";
    const LARGEST: PageSize = PageSize::Size1G;
    const ABSENT: u64 = 0;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;
    const BREAK_BEFORE_MAKE: bool = false;

    fn is_present(raw: u64) -> bool {
        raw & PRESENT != 0
    }

    fn is_leaf(raw: u64, level: u8) -> bool {
        level == 1 || raw & LARGE != 0
    }

    fn is_table(raw: u64) -> bool {
        raw & (PRESENT | LARGE) == PRESENT
    }

    fn table(frame: Pfn) -> u64 {
        frame.address().raw() | PRESENT | WRITE | USER
    }

    fn leaf(frame: Pfn, size: PageSize, attributes: Attributes<Self>) -> u64 {
        let large = if size == PageSize::Size4K { 0 } else { LARGE };
        let used = use_bits::<Self>(attributes.used);
        let write = if attributes.permissions.writable() { WRITE } else { 0 };
        let execute = if attributes.permissions.executable() { 0 } else { NO_EXECUTE };
        frame.address().raw() | PRESENT | USER | write | execute | large | used | attributes.memory.bits()
    }

    fn permissions(raw: u64) -> Permissions {
        match (raw & WRITE != 0, raw & NO_EXECUTE != 0) {
            (false, true) => Permissions::READ,
            (false, false) => Permissions::READ_EXECUTE,
            (true, true) => Permissions::READ_WRITE,
            (true, false) => Permissions::ALL,
        }
    }

    fn memory(raw: u64) -> NptMemoryType {
        NptMemoryType::from_bits(raw)
    }

    fn write_protected(raw: u64) -> u64 {
        raw & !WRITE
    }
}

impl TracksUse for Npt {}
