//! One section of the firmware: what the VMM puts where.

use std::fmt;

use premap_address::GpaRange;

/// What a section is for. The list is open: a firmware may bring types that this crate has no name for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionType(pub u32);

impl SectionType {
    /// Boot firmware volume: code, with the reset vector.
    pub const BFV: Self = Self(0);
    /// Configuration firmware volume: UEFI variables.
    pub const CFV: Self = Self(1);
    /// Where the VMM puts the TD HOB.
    pub const TD_HOB: Self = Self(2);
    /// Memory for the firmware's first steps: stack, heap, mailbox.
    pub const TEMP_MEM: Self = Self(3);
    /// Memory that stays.
    pub const PERM_MEM: Self = Self(4);
    /// A payload, such as a kernel.
    pub const PAYLOAD: Self = Self(5);
    /// The payload's parameters.
    pub const PAYLOAD_PARAM: Self = Self(6);
    /// What the firmware tells of itself.
    pub const TD_INFO: Self = Self(7);
    /// Parameters for the TD's creation.
    pub const TD_PARAMS: Self = Self(8);

    const NAMES: [&str; 9] =
        ["BFV", "CFV", "TD_HOB", "TempMem", "PermMem", "Payload", "PayloadParam", "TD_INFO", "TD_PARAMS"];

    /// The type's name, if it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Self::NAMES.get(usize::try_from(self.0).ok()?).copied()
    }

    /// Whether a section of this type is a firmware volume, which is nothing without data.
    pub(super) fn is_volume(self) -> bool {
        matches!(self, Self::BFV | Self::CFV)
    }

    /// Whether a section of this type is memory that the firmware wants empty.
    pub(super) fn is_blank(self) -> bool {
        matches!(self, Self::TD_HOB | Self::TEMP_MEM)
    }
}

impl fmt::Display for SectionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => f.pad(&format!("type-{:#x}", self.0)),
        }
    }
}

impl fmt::Debug for SectionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectionType({self})")
    }
}

bitflags::bitflags! {
    /// How a section is loaded.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Attributes: u32 {
        /// The content is measured: MR.EXTEND of every 256 bytes.
        const MR_EXTEND = 1 << 0;
        /// Pages are meant to come by PAGE.AUG, after the measurement is final.
        const PAGE_AUG = 1 << 1;
    }
}

/// A section of a firmware image that has been checked: its data lie in the image and are no longer than its memory, its
/// memory is private, and no other section has part of either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    pub(super) kind: SectionType,
    pub(super) attributes: Attributes,
    pub(super) memory: GpaRange,
    pub(super) data_offset: u64,
    pub(super) data: &'a [u8],
}

impl<'a> Section<'a> {
    /// What the section is for.
    #[must_use]
    pub fn kind(&self) -> SectionType {
        self.kind
    }

    /// How it is loaded.
    #[must_use]
    pub fn attributes(&self) -> Attributes {
        self.attributes
    }

    /// Whether its content is part of the measurement.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        self.attributes.contains(Attributes::MR_EXTEND)
    }

    /// Its place in the guest's memory.
    #[must_use]
    pub fn memory(&self) -> GpaRange {
        self.memory
    }

    /// Where its data lie in the image.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Its data. Where they are shorter than the memory, the rest of the memory is zero.
    #[must_use]
    pub fn data(&self) -> &'a [u8] {
        self.data
    }
}
