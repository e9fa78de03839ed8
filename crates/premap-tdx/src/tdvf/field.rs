//! The fields that metadata consist of, and their names.

use std::fmt;

/// A field of the image that was found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field {
    /// The GUID that ends the table of GUIDed structures.
    TableFooter,
    /// The table's length.
    TableLength,
    /// The length of an entry of the table.
    EntryLength,
    /// The table's entry about TDX: how far the descriptor lies from the image's end.
    MetadataOffset,
    /// The GUID before the descriptor.
    DescriptorGuid,
    /// The descriptor's first word, `TDVF`.
    Signature,
    /// The descriptor's length.
    Length,
    /// The descriptor's version.
    Version,
    /// The number of sections.
    SectionCount,
    /// A field of a section's entry.
    Section {
        /// Which section, counted from 0.
        index: usize,
        /// The field.
        field: SectionField,
    },
}

/// A field of a section's entry, 32 bytes in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionField {
    /// Where the section's data lies in the image.
    DataOffset,
    /// How many bytes of data it has.
    RawSize,
    /// Its guest-physical address.
    MemoryAddress,
    /// Its size in the guest's memory.
    MemorySize,
    /// What it is for.
    Type,
    /// How it is loaded.
    Attributes,
}

impl SectionField {
    /// Where the field lies in the entry.
    #[must_use]
    pub const fn offset(self) -> u64 {
        match self {
            Self::DataOffset => 0,
            Self::RawSize => 4,
            Self::MemoryAddress => 8,
            Self::MemorySize => 16,
            Self::Type => 24,
            Self::Attributes => 28,
        }
    }
}

impl fmt::Display for SectionField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DataOffset => "DataOffset",
            Self::RawSize => "RawDataSize",
            Self::MemoryAddress => "MemoryAddress",
            Self::MemorySize => "MemoryDataSize",
            Self::Type => "Type",
            Self::Attributes => "Attributes",
        })
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TableFooter => "GUID table's footer",
            Self::TableLength => "GUID table's length",
            Self::EntryLength => "GUID table entry's length",
            Self::MetadataOffset => "TDX metadata offset",
            Self::DescriptorGuid => "GUID before the TDVF descriptor",
            Self::Signature => "TDVF descriptor's Signature",
            Self::Length => "TDVF descriptor's Length",
            Self::Version => "TDVF descriptor's Version",
            Self::SectionCount => "TDVF descriptor's NumberOfSectionEntries",
            Self::Section { index, field } => return write!(f, "section {index}'s {field}"),
        })
    }
}
