//! What can be wrong with a TDVF image: which field, where, and why.

use premap_address::{Gpa, GpaRange};

use super::field::Field;
use super::section::SectionType;

/// Why an image gives no TDVF metadata.
///
/// `offset` is where the field lies in the image; where VARS and CODE were joined, in the joined image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} at offset {offset:#x}: {fault}")]
pub struct TdvfError {
    /// Where the field lies, in bytes from the image's start.
    pub offset: u64,
    /// The field.
    pub field: Field,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The image ends before the field could.
    #[error("the image has only {len:#x} bytes")]
    ImageEnds {
        /// The image's length.
        len: u64,
    },
    /// No footer, and the older pointer at the image's end leads to no descriptor either.
    #[error(
        "not there, so this is no firmware for a TD (a VARS file has none: give CODE, or the whole image)"
    )]
    NoFooter,
    /// The table has no entry about TDX, and the older pointer leads to no descriptor either.
    #[error("the table has no entry about TDX, so this firmware was not built for a TD")]
    NoTdxEntry,
    /// The table has two entries about TDX, and tools would differ in which they take.
    #[error("a second entry about TDX; the first ends at offset {first:#x}")]
    SecondTdxEntry {
        /// Where the first one ends.
        first: u64,
    },
    /// A length that is too small to hold its own fields; walking on would never end.
    #[error("{value} bytes, but at least {least} are needed")]
    TooSmall {
        /// The length claimed.
        value: u32,
        /// What its own fields take.
        least: u32,
    },
    /// A length that reaches out of what holds it.
    #[error("{value:#x} bytes, but only {room:#x} are there")]
    TooLarge {
        /// The length claimed.
        value: u64,
        /// The room there is.
        room: u64,
    },
    /// A value other than the only right one.
    #[error("{value:#x} where {expected:#x} is expected")]
    Unexpected {
        /// What is there.
        value: u32,
        /// What should be.
        expected: u32,
    },
    /// An offset that points out of the image.
    #[error("{value:#x} points out of the image of {len:#x} bytes")]
    OutOfImage {
        /// The offset.
        value: u64,
        /// The image's length.
        len: u64,
    },
    /// Other bytes than the GUID expected.
    #[error("another GUID than that of TDVF metadata")]
    WrongGuid,
    /// Not the number of sections that a firmware has.
    #[error("{count} sections, but a firmware has at least {least}")]
    TooFewSections {
        /// How many there are.
        count: u32,
        /// How many there must be.
        least: u32,
    },
    /// More sections than any firmware needs.
    #[error("{count} sections, more than the {limit} allowed")]
    TooManySections {
        /// How many there are.
        count: u32,
        /// How many there may be.
        limit: u32,
    },
    /// The image is the CODE half of a split firmware, whose metadata speak of VARS followed by CODE.
    #[error(
        "a split CODE file: its metadata speak of {missing:#x} bytes of VARS before it; give the VARS file too"
    )]
    SplitCode {
        /// The length of the VARS file that is wanted.
        missing: u64,
    },
    /// The VARS given have not the length that CODE's metadata speak of.
    #[error("the metadata speak of {expected:#x} bytes of VARS before CODE, the file given has {given:#x}")]
    WrongVars {
        /// The length of the VARS given.
        given: u64,
        /// The length wanted; 0 if the other file is whole by itself.
        expected: u64,
    },
    /// Data that lie, or partly lie, beyond the image's end.
    #[error("the data end at {end:#x}, beyond the image of {len:#x} bytes")]
    DataOutOfImage {
        /// Where they would end.
        end: u64,
        /// The image's length.
        len: u64,
    },
    /// Data that another section claims too.
    #[error("section {other} has data at {start:#x} too")]
    DataOverlap {
        /// The other section.
        other: usize,
        /// The first byte claimed twice.
        start: u64,
    },
    /// More data than memory.
    #[error("{raw:#x} bytes of data for {memory:#x} bytes of memory")]
    RawExceedsMemory {
        /// The data's length.
        raw: u32,
        /// The memory's.
        memory: u64,
    },
    /// A firmware volume without data.
    #[error("a {kind} section must have data")]
    RawMissing {
        /// The section's type.
        kind: SectionType,
    },
    /// Data for memory that the firmware wants empty.
    #[error("a {kind} section must have no data, this has {raw:#x} bytes")]
    RawUnexpected {
        /// The section's type.
        kind: SectionType,
        /// How many bytes it claims.
        raw: u32,
    },
    /// An address or a size that is not whole 4 KiB pages.
    #[error("{value:#x} is not a multiple of 4 KiB")]
    Unaligned {
        /// The value.
        value: u64,
    },
    /// A section of no memory.
    #[error("a section of no memory")]
    Empty,
    /// Memory that would reach beyond 2^64.
    #[error("{bytes:#x} bytes from gpa {gpa} reach beyond 2^64")]
    Wraps {
        /// The first address.
        gpa: Gpa,
        /// The size.
        bytes: u64,
    },
    /// Memory beyond the highest private address of any TD.
    #[error("{memory} is not private memory of any TD: private addresses end at {limit}")]
    NotPrivate {
        /// The section's memory.
        memory: GpaRange,
        /// Where private addresses end.
        limit: Gpa,
    },
    /// Memory that another section claims too.
    #[error("section {other} has memory at gpa {start} too")]
    MemoryOverlap {
        /// The other section.
        other: usize,
        /// The first address claimed twice.
        start: Gpa,
    },
    /// More memory to add than any firmware needs.
    #[error("{total:#x} bytes of memory in the sections so far, more than the {limit:#x} allowed")]
    TooMuchMemory {
        /// The memory of this section and of those before it.
        total: u64,
        /// How much there may be.
        limit: u64,
    },
    /// Attributes that have no meaning yet, so that nobody can tell what they would do to the measurement.
    #[error("unknown bits {bits:#x}")]
    UnknownAttributes {
        /// Those bits.
        bits: u32,
    },
    /// A second section for the TD HOB, though a guest is told of one.
    #[error("a second TD_HOB section; section {first} is one already")]
    SecondTdHob {
        /// The first one.
        first: usize,
    },
    /// No boot firmware volume, so nothing to run.
    #[error("no section is a BFV, so there is no code to run")]
    NoBootVolume,
}
