//! From the image's end to the TDVF descriptor.
//!
//! ```text
//!  offset from the end
//!   -0x20  reset vector code up to the end; in older images its first word is the descriptor's offset from the start
//!   -0x30  footer GUID 96b582de-...
//!   -0x32  u16: length of the table, this word and the footer included
//!          entries, the last one first: data | u16 length (data + 18) | GUID
//! ```
//!
//! The walk goes down from -0x32. Every entry takes at least the 18 bytes of its own length and GUID, and none reaches
//! below the table's start: so a walk is as long as the table, 64 KiB at most, whatever the image claims. The entry
//! e47a6535-... holds one word: how far the descriptor lies from the image's end. The 16 bytes before the descriptor are
//! a GUID of its own. (EDK II: OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm, OvmfPkg/ResetVector/X64/OvmfTdxMetadata.asm)

use super::bytes::{array, u16_at, u32_at};
use super::error::{Fault, TdvfError};
use super::field::Field;
use super::guid::{DESCRIPTOR, Guid, TABLE_FOOTER, TDX_ENTRY};
use super::image::len;

/// From the footer to the image's end.
const FOOTER: u64 = 0x30;
/// From the table's length to the image's end.
const TABLE_LENGTH: u64 = 0x32;
/// From the word that older tools read to the image's end.
const OLDER_POINTER: u64 = 0x20;
/// What an entry's own length and GUID take; also the table's.
const TAG: u16 = 18;
/// The length of the entry about TDX: a word and the tag.
const TDX_ENTRY_LENGTH: u16 = TAG + 4;
/// The descriptor's first word.
pub(super) const SIGNATURE: [u8; 4] = *b"TDVF";

/// Finds the descriptor and gives its offset. Its signature is still to be checked.
pub(super) fn descriptor(image: &[u8]) -> Result<u64, TdvfError> {
    let size = len(image);
    let error = |offset, field, fault| TdvfError { offset, field, fault };
    let Some(table_end) = size.checked_sub(TABLE_LENGTH) else {
        return Err(error(0, Field::TableFooter, Fault::ImageEnds { len: size }));
    };
    let footer = size - FOOTER;
    if array::<16>(image, footer) != Some(TABLE_FOOTER) {
        return older_pointer(image).ok_or(error(footer, Field::TableFooter, Fault::NoFooter));
    }
    let Some(entry) = tdx_entry(image, table_end)? else {
        return older_pointer(image).ok_or(error(footer, Field::TableFooter, Fault::NoTdxEntry));
    };
    let distance = u32_at(image, entry).unwrap_or_default();
    let outside = Fault::OutOfImage { value: distance.into(), len: size };
    let offset = size.checked_sub(distance.into()).filter(|_| distance != 0);
    let offset = offset.ok_or(error(entry, Field::MetadataOffset, outside))?;
    let guid = offset.checked_sub(16).ok_or(error(entry, Field::MetadataOffset, outside))?;
    if array::<16>(image, guid) != Some(DESCRIPTOR) {
        return Err(error(guid, Field::DescriptorGuid, Fault::WrongGuid));
    }
    Ok(offset)
}

/// Walks the table whose length lies at `table_end` and gives where the data of the entry about TDX lie.
fn tdx_entry(image: &[u8], table_end: u64) -> Result<Option<u64>, TdvfError> {
    let error = |offset, field, fault| Err(TdvfError { offset, field, fault });
    let table = u16_at(image, table_end).unwrap_or_default();
    let Some(left) = table.checked_sub(TAG) else {
        let fault = Fault::TooSmall { value: table.into(), least: TAG.into() };
        return error(table_end, Field::TableLength, fault);
    };
    let Some(start) = table_end.checked_sub(left.into()) else {
        let fault = Fault::TooLarge { value: left.into(), room: table_end };
        return error(table_end, Field::TableLength, fault);
    };
    let (mut end, mut found) = (table_end, None);
    while end > start {
        let room = end - start;
        if room < u64::from(TAG) {
            let fault = Fault::TooLarge { value: TAG.into(), room };
            return error(start, Field::EntryLength, fault);
        }
        let at = end - u64::from(TAG);
        let length = u16_at(image, at).unwrap_or_default();
        if length < TAG {
            let fault = Fault::TooSmall { value: length.into(), least: TAG.into() };
            return error(at, Field::EntryLength, fault);
        }
        if u64::from(length) > room {
            return error(at, Field::EntryLength, Fault::TooLarge { value: length.into(), room });
        }
        let guid: Option<Guid> = array(image, end - 16);
        if guid == Some(TDX_ENTRY) {
            if length != TDX_ENTRY_LENGTH {
                let fault = Fault::Unexpected { value: length.into(), expected: TDX_ENTRY_LENGTH.into() };
                return error(at, Field::EntryLength, fault);
            }
            if let Some(first) = found.replace(end) {
                return error(
                    end - u64::from(length),
                    Field::MetadataOffset,
                    Fault::SecondTdxEntry { first },
                );
            }
        }
        end -= u64::from(length);
    }
    Ok(found.map(|end| end - u64::from(TDX_ENTRY_LENGTH)))
}

/// Follows the pointer of images from before the table: an offset from the start, believed only if a descriptor is
/// there, since later images have code in its place.
fn older_pointer(image: &[u8]) -> Option<u64> {
    let offset = u64::from(u32_at(image, len(image).checked_sub(OLDER_POINTER)?)?);
    (array(image, offset) == Some(SIGNATURE)).then_some(offset)
}
