//! From what an image claims to sections that can be relied on.
//!
//! Each section is checked by itself first, in the order of the file, then all against each other in n log n.

use std::ops::Range;

use premap_address::{Gpa, GpaRange, PAGE_SIZE, RangeError};

use super::descriptor::Entry;
use super::error::{Fault, TdvfError};
use super::field::SectionField;
use super::image::{Image, len};
use super::section::{Attributes, Section, SectionType};

/// Where private addresses end in the TD with the widest: its shared bit is bit 51.
const PRIVATE_END: Gpa = Gpa::new(1 << 51);

/// How much memory the sections of one firmware may have in all.
///
/// Firmware has some megabytes; a kernel as payload some tens. The bound keeps a hostile image, a few bytes of which can
/// claim any number of pages, from buying hours of hashing.
pub const MAX_MEMORY: u64 = 256 << 20;

/// Checks every section by itself.
pub(super) fn sections<'a>(image: &'a Image<'_>, entries: &[Entry]) -> Result<Vec<Section<'a>>, TdvfError> {
    whole(image, entries)?;
    let mut total = 0;
    entries.iter().map(|entry| section(image.bytes(), entry, &mut total)).collect()
}

/// Checks that the image is all of what the metadata speak of, neither half of a split one nor joined to a stranger.
fn whole(image: &Image<'_>, entries: &[Entry]) -> Result<(), TdvfError> {
    let Some(last) = entries.iter().max_by_key(|entry| entry.data_end()) else { return Ok(()) };
    let (end, size) = (last.data_end(), len(image.bytes()));
    if let Some(given) = image.vars() {
        let expected = end.saturating_sub(size - given);
        let fault = Fault::WrongVars { given, expected };
        return if given == expected { Ok(()) } else { Err(last.error(SectionField::RawSize, fault)) };
    }
    let missing = end.saturating_sub(size);
    let is_vars = |entry: &Entry| {
        entry.kind == SectionType::CFV && entry.data_offset == 0 && u64::from(entry.raw_size) == missing
    };
    if missing > 0 && entries.iter().any(is_vars) {
        return Err(last.error(SectionField::RawSize, Fault::SplitCode { missing }));
    }
    Ok(())
}

fn section<'a>(image: &'a [u8], entry: &Entry, total: &mut u64) -> Result<Section<'a>, TdvfError> {
    let data = data(image, entry)?;
    let memory = memory(entry)?;
    if u64::from(entry.raw_size) > memory.bytes() {
        let fault = Fault::RawExceedsMemory { raw: entry.raw_size, memory: memory.bytes() };
        return Err(entry.error(SectionField::RawSize, fault));
    }
    *total = total.saturating_add(memory.bytes());
    if *total > MAX_MEMORY {
        let fault = Fault::TooMuchMemory { total: *total, limit: MAX_MEMORY };
        return Err(entry.error(SectionField::MemorySize, fault));
    }
    let attributes = Attributes::from_bits(entry.attributes).ok_or_else(|| {
        let bits = entry.attributes & !Attributes::all().bits();
        entry.error(SectionField::Attributes, Fault::UnknownAttributes { bits })
    })?;
    Ok(Section { kind: entry.kind, attributes, memory, data_offset: entry.data_offset.into(), data })
}

fn data<'a>(image: &'a [u8], entry: &Entry) -> Result<&'a [u8], TdvfError> {
    let (kind, raw) = (entry.kind, entry.raw_size);
    if kind.is_volume() && raw == 0 {
        return Err(entry.error(SectionField::RawSize, Fault::RawMissing { kind }));
    }
    if kind.is_blank() && raw != 0 {
        return Err(entry.error(SectionField::RawSize, Fault::RawUnexpected { kind, raw }));
    }
    if raw == 0 {
        // Nothing is read, so where it would be read from says nothing.
        return Ok(&[]);
    }
    let range = usize::try_from(entry.data_offset).ok().zip(usize::try_from(entry.data_end()).ok());
    range.and_then(|(start, end)| image.get(start..end)).ok_or_else(|| {
        let size = len(image);
        let start = u64::from(entry.data_offset);
        if start >= size {
            let fault = Fault::OutOfImage { value: start, len: size };
            return entry.error(SectionField::DataOffset, fault);
        }
        entry.error(SectionField::RawSize, Fault::DataOutOfImage { end: entry.data_end(), len: size })
    })
}

fn memory(entry: &Entry) -> Result<GpaRange, TdvfError> {
    let (gpa, bytes) = (Gpa::new(entry.memory_address), entry.memory_size);
    let memory = GpaRange::try_new(gpa, bytes).map_err(|error| match error {
        RangeError::UnalignedStart(gpa) => {
            entry.error(SectionField::MemoryAddress, Fault::Unaligned { value: gpa.raw() })
        }
        RangeError::UnalignedLength(value) => {
            entry.error(SectionField::MemorySize, Fault::Unaligned { value })
        }
        RangeError::Empty(_) => entry.error(SectionField::MemorySize, Fault::Empty),
        RangeError::Wraps(gpa, bytes) => entry.error(SectionField::MemorySize, Fault::Wraps { gpa, bytes }),
    })?;
    if memory.end() > PRIVATE_END {
        let fault = Fault::NotPrivate { memory, limit: PRIVATE_END };
        return Err(entry.error(SectionField::MemoryAddress, fault));
    }
    Ok(memory)
}

/// Checks the sections against each other.
pub(super) fn together(entries: &[Entry], sections: &[Section<'_>]) -> Result<(), TdvfError> {
    let memory = |section: &Section<'_>| Some(section.memory.start().raw()..section.memory.end().raw());
    if let Some((entry, other, start)) = overlap(entries, sections, memory) {
        let fault = Fault::MemoryOverlap { other, start: Gpa::new(start) };
        return Err(entry.error(SectionField::MemoryAddress, fault));
    }
    let data = |section: &Section<'_>| {
        let end = section.data_offset + len(section.data);
        (!section.data.is_empty()).then_some(section.data_offset..end)
    };
    if let Some((entry, other, start)) = overlap(entries, sections, data) {
        return Err(entry.error(SectionField::DataOffset, Fault::DataOverlap { other, start }));
    }
    let mut hobs = entries.iter().filter(|entry| entry.kind == SectionType::TD_HOB);
    if let (Some(first), Some(second)) = (hobs.next(), hobs.next()) {
        return Err(second.error(SectionField::Type, Fault::SecondTdHob { first: first.index }));
    }
    match entries {
        [first, ..] if !entries.iter().any(|entry| entry.kind == SectionType::BFV) => {
            Err(first.error(SectionField::Type, Fault::NoBootVolume))
        }
        _ => Ok(()),
    }
}

/// Finds two sections that share part of a range: the later one, the other's index, and the first address shared.
fn overlap<'e>(
    entries: &'e [Entry],
    sections: &[Section<'_>],
    range: impl Fn(&Section<'_>) -> Option<Range<u64>>,
) -> Option<(&'e Entry, usize, u64)> {
    let mut ranges: Vec<(Range<u64>, &Entry)> =
        sections.iter().zip(entries).filter_map(|(section, entry)| Some((range(section)?, entry))).collect();
    ranges.sort_by_key(|(range, _)| range.start);
    // Where any two overlap, a pair of neighbours does.
    ranges.windows(2).find_map(|pair| match pair {
        [(low, one), (high, two)] if high.start < low.end => {
            let (other, entry) = if one.index < two.index { (one, *two) } else { (two, *one) };
            Some((entry, other.index, high.start))
        }
        _ => None,
    })
}

const _: () = assert!(MAX_MEMORY.is_multiple_of(PAGE_SIZE));
