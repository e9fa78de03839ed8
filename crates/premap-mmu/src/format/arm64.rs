//! Arm's stage 2 with a 4 KiB granule and hardware management of the access flag and of dirty state. Bits from the Arm
//! ARM (DDI 0487), D8.3 (VMSAv8-64 descriptors), D8.4.2 (stage 2 access permissions) and D8.5 (hardware updates).
//!
//! A change of a block's size needs break-before-make (D8.16.1) where FEAT_BBM is not at level 2, so the format asks for it.

use premap_address::{PageSize, Pfn};

use super::{Format, TracksUse, use_bits};
use crate::attributes::{Attributes, Permissions, Use};

const VALID: u64 = 1 << 0;
/// Bit 1: a table at levels above the last, and a page at the last; clear for a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
const MEMORY_SHIFT: u32 = 2;
/// S2AP\[0\]: reading.
const READ: u64 = 1 << 6;
/// S2AP\[1\]: writing; with `DIRTY_MANAGED` set, hardware sets it at the first write.
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
/// DBM: writing is permitted, and `WRITE` says whether it happened.
const DIRTY_MANAGED: u64 = 1 << 51;
/// Bits 47:12: 48 bits of output address. What lies above is attributes.
const OUTPUT_ADDRESS: u64 = 0x0000_ffff_ffff_f000;
/// XN\[1\], with XN\[0\] clear: no instruction fetch at either level.
const NO_EXECUTE: u64 = 1 << 54;

/// Arm's stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Arm64Stage2;

/// The memory type of a stage-2 leaf (MemAttr, FEAT_S2FWB off).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arm64MemoryType {
    /// Normal, inner and outer write-back.
    #[default]
    WriteBack,
    /// Normal, not cached.
    NonCacheable,
    /// Device-nGnRE.
    Device,
}

impl Arm64MemoryType {
    const fn bits(self) -> u64 {
        match self {
            Self::WriteBack => 0b1111 << MEMORY_SHIFT,
            Self::NonCacheable => 0b0101 << MEMORY_SHIFT,
            Self::Device => 0b0001 << MEMORY_SHIFT,
        }
    }

    const fn from_bits(raw: u64) -> Self {
        match raw >> MEMORY_SHIFT & 0b1111 {
            0b1111 => Self::WriteBack,
            0b0101 => Self::NonCacheable,
            _ => Self::Device,
        }
    }
}

impl Format for Arm64Stage2 {
    type MemoryType = Arm64MemoryType;

    const NAME: &'static str = "Arm stage 2";
    const LARGEST: PageSize = PageSize::Size1G;
    const ABSENT: u64 = 0;
    const ACCESSED: u64 = ACCESS_FLAG;
    const DIRTY: u64 = WRITE;
    const BREAK_BEFORE_MAKE: bool = true;

    fn is_present(raw: u64) -> bool {
        raw & VALID != 0
    }

    fn is_leaf(raw: u64, level: u8) -> bool {
        level == 1 || raw & TABLE_OR_PAGE == 0
    }

    fn table(frame: Pfn) -> u64 {
        frame.address().raw() | VALID | TABLE_OR_PAGE
    }

    fn leaf(frame: Pfn, size: PageSize, attributes: Attributes<Self>) -> u64 {
        let page = if size == PageSize::Size4K { TABLE_OR_PAGE } else { 0 };
        // A page that may not be written can't be dirty here: there is one bit for both.
        let writable = attributes.permissions.writable();
        let used = Use { dirty: attributes.used.dirty && writable, ..attributes.used };
        let write = if writable { DIRTY_MANAGED } else { 0 };
        let execute = if attributes.permissions.executable() { 0 } else { NO_EXECUTE };
        let rest = VALID | READ | INNER_SHAREABLE | attributes.memory.bits();
        frame.address().raw() | rest | page | use_bits::<Self>(used) | write | execute
    }

    fn permissions(raw: u64) -> Permissions {
        let write = if raw & (WRITE | DIRTY_MANAGED) != 0 { 0b010 } else { 0 };
        let execute = if raw & NO_EXECUTE == 0 { 0b100 } else { 0 };
        Permissions::from_bits(write | execute)
    }

    fn memory(raw: u64) -> Arm64MemoryType {
        Arm64MemoryType::from_bits(raw)
    }

    fn frame(raw: u64, size: PageSize) -> Pfn {
        Pfn::new((raw & OUTPUT_ADDRESS) >> premap_address::PAGE_SHIFT).align_down(size)
    }

    fn write_protected(raw: u64) -> u64 {
        raw & !(WRITE | DIRTY_MANAGED)
    }
}

impl TracksUse for Arm64Stage2 {}
