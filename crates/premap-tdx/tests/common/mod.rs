//! Firmware images for tests: the one that ships with them, and ones made to measure.
#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "each program uses a part, and a panic is the message"
)]

use std::io::Read;

/// Where the descriptor lies in an image of [`firmware`], from its end.
pub(crate) const DESCRIPTOR: usize = 0x800;
/// Where the u32 of the table's entry about TDX lies in an image of [`firmware`], from its end.
pub(crate) const TDX_ENTRY: usize = 0x32 + 22;
/// Where the table's length lies, from the end.
pub(crate) const TABLE_LENGTH: usize = 0x32;

/// A section's entry, field by field.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) data_offset: u32,
    pub(crate) raw: u32,
    pub(crate) gpa: u64,
    pub(crate) memory: u64,
    pub(crate) kind: u32,
    pub(crate) attributes: u32,
}

/// A firmware of 64 KiB: 4 KiB of variables, 60 KiB of code, a TD HOB and temporary memory.
pub(crate) const SMALL: [Entry; 4] = [
    Entry { data_offset: 0x1000, raw: 0xf000, gpa: 0xffff_1000, memory: 0xf000, kind: 0, attributes: 1 },
    Entry { data_offset: 0, raw: 0x1000, gpa: 0xffff_0000, memory: 0x1000, kind: 1, attributes: 0 },
    Entry { data_offset: 0, raw: 0, gpa: 0x80_9000, memory: 0x2000, kind: 2, attributes: 0 },
    Entry { data_offset: 0, raw: 0, gpa: 0x80_b000, memory: 0x3000, kind: 3, attributes: 0 },
];
/// The length of an image with the sections of [`SMALL`].
pub(crate) const SMALL_LEN: usize = 0x1_0000;

/// The GUIDs as they lie in an image, put down here apart from the crate's own.
pub(crate) const FOOTER_GUID: [u8; 16] = *b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d";
const TDX_GUID: [u8; 16] = *b"\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2";
const DESCRIPTOR_GUID: [u8; 16] = *b"\xf3\xf9\xea\xe9\x8e\x16\xd5\x44\xa8\xeb\x7f\x4d\x87\x38\xf6\xae";

/// Makes an image of `len` bytes with these sections; bytes that nothing else needs tell their position.
pub(crate) fn firmware(len: usize, sections: &[Entry]) -> Vec<u8> {
    firmware_with_room(len, DESCRIPTOR, sections)
}

/// The same, with the descriptor as far from the end as is said.
pub(crate) fn firmware_with_room(len: usize, room: usize, sections: &[Entry]) -> Vec<u8> {
    let mut image: Vec<u8> = (0..len).map(|position| u8::try_from(position / 7 % 251).unwrap()).collect();
    let descriptor = len - room;
    put(&mut image, descriptor - 16, &DESCRIPTOR_GUID);
    put(&mut image, descriptor, b"TDVF");
    let count = u32::try_from(sections.len()).unwrap();
    for (index, word) in [16 + 32 * count, 1, count].into_iter().enumerate() {
        put(&mut image, descriptor + 4 + 4 * index, &word.to_le_bytes());
    }
    for (index, section) in sections.iter().enumerate() {
        let at = descriptor + 16 + 32 * index;
        put(&mut image, at, &section.data_offset.to_le_bytes());
        put(&mut image, at + 4, &section.raw.to_le_bytes());
        put(&mut image, at + 8, &section.gpa.to_le_bytes());
        put(&mut image, at + 16, &section.memory.to_le_bytes());
        put(&mut image, at + 24, &section.kind.to_le_bytes());
        put(&mut image, at + 28, &section.attributes.to_le_bytes());
    }
    put(&mut image, len - 0x30, &FOOTER_GUID);
    put(&mut image, len - TABLE_LENGTH, &40_u16.to_le_bytes());
    put(&mut image, len - 0x32 - 16, &TDX_GUID);
    put(&mut image, len - 0x32 - 18, &22_u16.to_le_bytes());
    put(&mut image, len - TDX_ENTRY, &u32::try_from(room).unwrap().to_le_bytes());
    image
}

/// Overwrites bytes of an image.
pub(crate) fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The clean example of 2 MiB.
pub(crate) fn clean_example() -> Vec<u8> {
    unpack(include_bytes!("../data/gce_clean_example_2m.fd.gz"))
}

fn unpack(packed: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut image).unwrap();
    image
}
