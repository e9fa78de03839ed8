//! The TDVF descriptor: a header of 16 bytes and an entry of 32 for each section, all little-endian.
//!
//! ```text
//!  header  0 Signature "TDVF"   4 Length = 16 + 32 n   8 Version = 1   12 NumberOfSectionEntries = n
//!  entry   0 DataOffset u32     4 RawDataSize u32      8 MemoryAddress u64
//!         16 MemoryDataSize u64                       24 Type u32      28 Attributes u32
//! ```
//!
//! Nothing is set aside before the entries are known to lie in the image, so a claim costs no more than the image has
//! bytes.

use super::bytes::{array, u32_at, u64_at};
use super::error::{Fault, TdvfError};
use super::field::{Field, SectionField};
use super::image::len;
use super::locate::SIGNATURE;
use super::section::SectionType;

const HEADER: u64 = 16;
const ENTRY: u64 = 32;
const VERSION: u32 = 1;
/// A boot volume and one more: what QEMU asks for, too.
const LEAST_SECTIONS: u32 = 2;
/// Firmware has about seven; a file that claims thousands only wants to keep its reader busy.
const MOST_SECTIONS: u32 = 1024;

/// A section as the image claims it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) index: usize,
    /// Where the entry lies in the image.
    offset: u64,
    pub(super) data_offset: u32,
    pub(super) raw_size: u32,
    pub(super) memory_address: u64,
    pub(super) memory_size: u64,
    pub(super) kind: SectionType,
    pub(super) attributes: u32,
}

impl Entry {
    fn read(image: &[u8], index: usize, offset: u64) -> Option<Self> {
        let at = |field: SectionField| offset + field.offset();
        Some(Self {
            index,
            offset,
            data_offset: u32_at(image, at(SectionField::DataOffset))?,
            raw_size: u32_at(image, at(SectionField::RawSize))?,
            memory_address: u64_at(image, at(SectionField::MemoryAddress))?,
            memory_size: u64_at(image, at(SectionField::MemorySize))?,
            kind: SectionType(u32_at(image, at(SectionField::Type))?),
            attributes: u32_at(image, at(SectionField::Attributes))?,
        })
    }

    /// Where the section's data end; two u32 fit.
    pub(super) fn data_end(&self) -> u64 {
        u64::from(self.data_offset) + u64::from(self.raw_size)
    }

    /// An error about a field of this section.
    pub(super) fn error(&self, field: SectionField, fault: Fault) -> TdvfError {
        let offset = self.offset + field.offset();
        TdvfError { offset, field: Field::Section { index: self.index, field }, fault }
    }
}

/// Reads the descriptor at `offset`.
pub(super) fn entries(image: &[u8], offset: u64) -> Result<Vec<Entry>, TdvfError> {
    let size = len(image);
    let error = |at: u64, field, fault| TdvfError { offset: offset + at, field, fault };
    let word =
        |at: u64, field| u32_at(image, offset + at).ok_or(error(at, field, Fault::ImageEnds { len: size }));
    let signature = word(0, Field::Signature)?;
    if array(image, offset) != Some(SIGNATURE) {
        let fault = Fault::Unexpected { value: signature, expected: u32::from_le_bytes(SIGNATURE) };
        return Err(error(0, Field::Signature, fault));
    }
    let (length, version) = (word(4, Field::Length)?, word(8, Field::Version)?);
    let count = word(12, Field::SectionCount)?;
    if version != VERSION {
        return Err(error(8, Field::Version, Fault::Unexpected { value: version, expected: VERSION }));
    }
    if count < LEAST_SECTIONS {
        return Err(error(12, Field::SectionCount, Fault::TooFewSections { count, least: LEAST_SECTIONS }));
    }
    if count > MOST_SECTIONS {
        return Err(error(12, Field::SectionCount, Fault::TooManySections { count, limit: MOST_SECTIONS }));
    }
    let (needed, room) = (HEADER + ENTRY * u64::from(count), size - offset);
    if needed > room {
        return Err(error(12, Field::SectionCount, Fault::TooLarge { value: needed, room }));
    }
    if u64::from(length) != needed {
        let expected = u32::try_from(needed).unwrap_or(u32::MAX);
        return Err(error(4, Field::Length, Fault::Unexpected { value: length, expected }));
    }
    let ends = error(12, Field::SectionCount, Fault::ImageEnds { len: size });
    let offsets = (0..u64::from(count)).map(|index| offset + HEADER + ENTRY * index);
    offsets.enumerate().map(|(index, at)| Entry::read(image, index, at).ok_or(ends)).collect()
}
