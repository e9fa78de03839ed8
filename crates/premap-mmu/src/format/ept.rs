//! Intel's extended page tables. Bits from the Intel SDM, volume 3C, 30.3.2 (tables 30-1 to 30-7).

use premap_address::{PageSize, Pfn};

use super::{Format, TracksUse, use_bits};
use crate::attributes::{Attributes, Permissions};

/// Bits 2:0: read, write, execute. An entry with none of them is not present.
const RWX: u64 = 0b111;
const WRITE: u64 = 1 << 1;
/// Bits 5:3 of a leaf.
const MEMORY_TYPE_SHIFT: u32 = 3;
/// Bit 6 of a leaf: the guest's PAT does not change the memory type.
const IGNORE_PAT: u8 = 1 << 6;
/// Bit 7 of an entry of level 2 or 3.
const LARGE: u64 = 1 << 7;
/// Bit 8, if EPTP bit 6 turns access and dirty flags on.
const ACCESSED: u64 = 1 << 8;
/// Bit 9 of a leaf, likewise.
const DIRTY: u64 = 1 << 9;
/// Bit 63: an entry that is not present causes an EPT violation and not a virtualization exception.
const SUPPRESS_VE: u64 = 1 << 63;

/// Intel's extended page tables, with access and dirty flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ept;

/// The memory type of an EPT leaf, and whether the guest's PAT is combined with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EptMemoryType {
    /// Write-back, combined with the guest's PAT.
    #[default]
    WriteBack = 6 << MEMORY_TYPE_SHIFT,
    /// Write-back whatever the guest's PAT says.
    WriteBackForced = 6 << MEMORY_TYPE_SHIFT | IGNORE_PAT,
    /// Uncacheable: for device memory.
    Uncacheable = 0,
}

impl EptMemoryType {
    pub(super) const fn bits(self) -> u64 {
        // The discriminants are the bits: no table to look them up in for each leaf.
        self as u64
    }

    pub(super) const fn from_bits(raw: u64) -> Self {
        match (raw >> MEMORY_TYPE_SHIFT & 0b111, raw & IGNORE_PAT as u64 != 0) {
            (6, false) => Self::WriteBack,
            (6, true) => Self::WriteBackForced,
            _ => Self::Uncacheable,
        }
    }
}

const fn large(size: PageSize) -> u64 {
    match size {
        PageSize::Size4K => 0,
        PageSize::Size2M | PageSize::Size1G => LARGE,
    }
}

impl Format for Ept {
    type MemoryType = EptMemoryType;

    const NAME: &'static str = "EPT";
    const LARGEST: PageSize = PageSize::Size1G;
    const ABSENT: u64 = SUPPRESS_VE;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;
    const BREAK_BEFORE_MAKE: bool = false;

    fn is_present(raw: u64) -> bool {
        raw & RWX != 0
    }

    fn is_leaf(raw: u64, level: u8) -> bool {
        level == 1 || raw & LARGE != 0
    }

    fn is_table(raw: u64) -> bool {
        raw & (RWX | LARGE) == RWX
    }

    fn table(frame: Pfn) -> u64 {
        frame.address().raw() | RWX
    }

    fn leaf(frame: Pfn, size: PageSize, attributes: Attributes<Self>) -> u64 {
        let used = use_bits::<Self>(attributes.used);
        let permissions = attributes.permissions.bits();
        frame.address().raw() | permissions | attributes.memory.bits() | large(size) | used | SUPPRESS_VE
    }

    fn permissions(raw: u64) -> Permissions {
        Permissions::from_bits(raw)
    }

    fn memory(raw: u64) -> EptMemoryType {
        EptMemoryType::from_bits(raw)
    }

    fn write_protected(raw: u64) -> u64 {
        raw & !WRITE
    }
}

impl TracksUse for Ept {}
