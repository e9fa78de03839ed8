//! Images that lie: each is refused, with the field and its offset, soon and without setting aside what it claims.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use std::time::Duration;

use common::{
    DESCRIPTOR, Entry, SMALL, SMALL_LEN, TABLE_LENGTH, TDX_ENTRY, firmware, firmware_with_room, put,
};
use premap_address::{Gpa, GpaRange};
use premap_tdx::tdvf::{Fault, Field, MAX_MEMORY, SectionField};
use premap_tdx::{Image, SectionType, Tdvf, TdvfError};
use rustix::time::{ClockId, clock_gettime};

/// How long an answer may take, however hostile the image, in processor time: what others do on the machine meanwhile says
/// nothing of the answer.
const SOON: Duration = Duration::from_millis(100);

/// The descriptor's offset in a small image.
const AT: usize = SMALL_LEN - DESCRIPTOR;
const LEN: u64 = SMALL_LEN as u64;

/// Parses, and sees to it that the answer comes soon.
#[track_caller]
fn parse<'a>(image: &'a Image<'_>) -> Result<Tdvf<'a>, TdvfError> {
    let clock = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let begin = clock();
    let parsed = Tdvf::parse(image);
    let took = clock() - begin;
    assert!(took < SOON, "{took:?}");
    parsed
}

#[track_caller]
fn check(image: &[u8], offset: usize, field: Field, fault: Fault) {
    let image = Image::new(image);
    let found = parse(&image).expect_err("the image is bad");
    let text = found.to_string();
    assert!(text.contains(&format!("{offset:#x}")) && text.contains(&field.to_string()), "{text}");
    assert_eq!(found, TdvfError { offset: offset as u64, field, fault });
}

/// Overwrites bytes of a good small image and expects an error at `offset`.
#[track_caller]
fn patched(at: usize, bytes: &[u8], offset: usize, field: Field, fault: Fault) {
    let mut image = firmware(SMALL_LEN, &SMALL);
    put(&mut image, at, bytes);
    check(&image, offset, field, fault);
}

/// Changes a section of a good small image and expects an error in a field of it.
#[track_caller]
fn section(index: usize, change: impl FnOnce(&mut Entry), field: SectionField, fault: Fault) {
    let mut sections = SMALL;
    change(&mut sections[index]);
    let offset = AT + 16 + 32 * index + usize::try_from(field.offset()).unwrap();
    check(&firmware(SMALL_LEN, &sections), offset, Field::Section { index, field }, fault);
}

#[test]
fn the_image_that_the_others_are_made_from_is_good() {
    let image = Image::new(firmware(SMALL_LEN, &SMALL));
    let tdvf = Tdvf::parse(&image).unwrap();
    assert_eq!((tdvf.offset(), tdvf.sections().len()), (AT as u64, 4));
    assert_eq!(tdvf.td_hob().unwrap().memory(), GpaRange::new(Gpa::new(0x80_9000), 0x2000));
    assert_eq!(tdvf.sections()[0].data(), &image.bytes()[0x1000..]);
}

#[test]
fn what_is_no_firmware_is_told_so() {
    check(&[], 0, Field::TableFooter, Fault::ImageEnds { len: 0 });
    check(&[0; 0x31], 0, Field::TableFooter, Fault::ImageEnds { len: 0x31 });
    check(&[0; 0x32], 2, Field::TableFooter, Fault::NoFooter);
    check(&[0xff; SMALL_LEN], SMALL_LEN - 0x30, Field::TableFooter, Fault::NoFooter);
    patched(SMALL_LEN - 0x32 - 16, &[0; 16], SMALL_LEN - 0x30, Field::TableFooter, Fault::NoTdxEntry);
}

#[test]
fn a_table_that_leads_astray_is_refused() {
    let length = SMALL_LEN - TABLE_LENGTH;
    let entry = length - 18;
    let table = Field::TableLength;
    patched(length, &[17, 0], length, table, Fault::TooSmall { value: 17, least: 18 });
    patched(length, &[0, 0], length, table, Fault::TooSmall { value: 0, least: 18 });
    let mut short = firmware(SMALL_LEN, &SMALL).split_off(SMALL_LEN - 0x100);
    put(&mut short, 0x100 - TABLE_LENGTH, &[0xff, 0xff]);
    let fault = Fault::TooLarge { value: 0xffff - 18, room: 0x100 - 0x32 };
    check(&short, 0x100 - TABLE_LENGTH, table, fault);

    let tag = Field::EntryLength;
    patched(entry, &[0, 0], entry, tag, Fault::TooSmall { value: 0, least: 18 });
    patched(entry, &[17, 0], entry, tag, Fault::TooSmall { value: 17, least: 18 });
    patched(entry, &[23, 0], entry, tag, Fault::TooLarge { value: 23, room: 22 });
    patched(entry, &[0xff, 0xff], entry, tag, Fault::TooLarge { value: 0xffff, room: 22 });
    patched(entry, &[18, 0], entry, tag, Fault::Unexpected { value: 18, expected: 22 });
    // A table with 4 bytes more than its entries take.
    patched(length, &[44, 0], length - 26, tag, Fault::TooLarge { value: 18, room: 4 });
}

#[test]
fn a_second_entry_about_tdx_is_refused() {
    let mut image = firmware(SMALL_LEN, &SMALL);
    let length = SMALL_LEN - TABLE_LENGTH;
    let entry = image[length - 22..length].to_vec();
    put(&mut image, length - 44, &entry);
    put(&mut image, length, &[62, 0]);
    let fault = Fault::SecondTdxEntry { first: length as u64 };
    check(&image, length - 44, Field::MetadataOffset, fault);
}

#[test]
fn an_offset_that_points_elsewhere_is_refused() {
    let at = SMALL_LEN - TDX_ENTRY;
    let to = |distance: u32, offset, field, fault| {
        patched(at, &distance.to_le_bytes(), offset, field, fault);
    };
    for distance in [0, 0x1_0001, u32::MAX, 0x1_0000 - 15] {
        let fault = Fault::OutOfImage { value: distance.into(), len: LEN };
        to(distance, at, Field::MetadataOffset, fault);
    }
    to(0x1000, SMALL_LEN - 0x1010, Field::DescriptorGuid, Fault::WrongGuid);
    // The GUID is there but the image ends before the descriptor could.
    let mut image = firmware(SMALL_LEN, &SMALL);
    let guid = image[AT - 16..AT].to_vec();
    put(&mut image, SMALL_LEN - 16 - 2, &guid);
    put(&mut image, at, &2_u32.to_le_bytes());
    check(&image, SMALL_LEN - 2, Field::Signature, Fault::ImageEnds { len: LEN });
}

#[test]
fn a_descriptor_that_contradicts_itself_is_refused() {
    let (length, version, count) = (Field::Length, Field::Version, Field::SectionCount);
    let signature = Fault::Unexpected { value: 0x4656_4458, expected: 0x4656_4454 };
    patched(AT, b"XDVF", AT, Field::Signature, signature);
    let word = |at, value: u32, field, fault| patched(AT + at, &value.to_le_bytes(), AT + at, field, fault);
    word(4, 143, length, Fault::Unexpected { value: 143, expected: 144 });
    word(4, u32::MAX, length, Fault::Unexpected { value: u32::MAX, expected: 144 });
    word(8, 2, version, Fault::Unexpected { value: 2, expected: 1 });
    word(12, 0, count, Fault::TooFewSections { count: 0, least: 2 });
    word(12, 1, count, Fault::TooFewSections { count: 1, least: 2 });
    word(12, 1000, count, Fault::TooLarge { value: 16 + 32_000, room: DESCRIPTOR as u64 });
    // 16 + 32 n wraps in 32 bits to what Length says.
    for many in [1025, 0x0800_0004, u32::MAX] {
        word(12, many, count, Fault::TooManySections { count: many, limit: 1024 });
    }
}

#[test]
fn data_that_are_not_there_are_refused() {
    use SectionField::{DataOffset, RawSize};
    let outside = Fault::OutOfImage { value: 0x1_0000, len: LEN };
    section(0, |bfv| bfv.data_offset = 0x1_0000, DataOffset, outside);
    let ends = |end| Fault::DataOutOfImage { end, len: LEN };
    section(0, |bfv| bfv.data_offset = 0x1001, RawSize, ends(0x1_0001));
    section(0, |bfv| bfv.raw = u32::MAX, RawSize, ends(0x1_0000_0fff));
    section(0, |bfv| (bfv.raw, bfv.data_offset) = (u32::MAX, 1), RawSize, ends(1 << 32));
    section(0, |bfv| bfv.raw = 0, RawSize, Fault::RawMissing { kind: SectionType::BFV });
    section(1, |cfv| cfv.raw = 0, RawSize, Fault::RawMissing { kind: SectionType::CFV });
    section(2, |hob| hob.raw = 1, RawSize, Fault::RawUnexpected { kind: SectionType::TD_HOB, raw: 1 });
    section(3, |mem| mem.raw = 9, RawSize, Fault::RawUnexpected { kind: SectionType::TEMP_MEM, raw: 9 });
    section(0, |bfv| bfv.memory = 0xe000, RawSize, Fault::RawExceedsMemory { raw: 0xf000, memory: 0xe000 });
}

#[test]
fn memory_that_cannot_be_is_refused() {
    use SectionField::{MemoryAddress, MemorySize};
    section(3, |mem| mem.gpa += 1, MemoryAddress, Fault::Unaligned { value: 0x80_b001 });
    section(3, |mem| mem.memory = 0x3800, MemorySize, Fault::Unaligned { value: 0x3800 });
    section(3, |mem| mem.memory = 0, MemorySize, Fault::Empty);
    section(0, |bfv| bfv.memory = 0, MemorySize, Fault::Empty);
    let last = Gpa::new(!0xfff);
    section(3, |mem| mem.gpa = !0xfff, MemorySize, Fault::Wraps { gpa: last, bytes: 0x3000 });
    section(
        3,
        |mem| mem.memory = !0xfff,
        MemorySize,
        Fault::Wraps { gpa: Gpa::new(0x80_b000), bytes: !0xfff },
    );
    let (gpa, limit) = (Gpa::new((1 << 51) - 0x1000), Gpa::new(1 << 51));
    let fault = Fault::NotPrivate { memory: GpaRange::new(gpa, 0x3000), limit };
    section(3, |mem| mem.gpa = gpa.raw(), MemoryAddress, fault);
    let total = 0x1_2000 + (4 << 30);
    section(3, |mem| mem.memory = 4 << 30, MemorySize, Fault::TooMuchMemory { total, limit: MAX_MEMORY });
    section(
        3,
        |mem| mem.attributes = 0x8000_0004,
        SectionField::Attributes,
        Fault::UnknownAttributes { bits: 0x8000_0004 },
    );
}

#[test]
fn sections_that_quarrel_are_refused() {
    use SectionField::{DataOffset, MemoryAddress, Type};
    let fault = |other, gpa| Fault::MemoryOverlap { other, start: Gpa::new(gpa) };
    section(3, |mem| mem.gpa = 0x80_a000, MemoryAddress, fault(2, 0x80_a000));
    section(3, |mem| mem.gpa = 0x80_8000, MemoryAddress, fault(2, 0x80_9000));
    section(1, |cfv| cfv.gpa = 0xffff_2000, MemoryAddress, fault(0, 0xffff_2000));
    section(1, |cfv| cfv.data_offset = 0xfff, DataOffset, Fault::DataOverlap { other: 0, start: 0x1000 });
    section(3, |mem| mem.kind = 2, Type, Fault::SecondTdHob { first: 2 });
    section(0, |bfv| bfv.kind = 5, Type, Fault::NoBootVolume);
}

#[test]
fn halves_are_told_from_damage() {
    let whole = firmware(SMALL_LEN, &SMALL);
    let (vars, code) = whole.split_at(0x1000);
    let raw = Field::Section { index: 0, field: SectionField::RawSize };
    let at = AT + 16 + 4;
    check(code, at - 0x1000, raw, Fault::SplitCode { missing: 0x1000 });
    // One byte more is gone than VARS would have.
    check(&code[1..], at - 0x1001, raw, Fault::DataOutOfImage { end: 0x1_0000, len: 0xefff });
    let joined = Image::join(vars, code);
    assert_eq!(Tdvf::parse(&joined).unwrap(), Tdvf::parse(&Image::new(whole.as_slice())).unwrap());
    for (vars, code, offset, fault) in [
        (&vars[1..], code, at - 1, Fault::WrongVars { given: 0xfff, expected: 0x1000 }),
        (&[0; 0x2000], code, at + 0x1000, Fault::WrongVars { given: 0x2000, expected: 0x1000 }),
        (vars, whole.as_slice(), at + 0x1000, Fault::WrongVars { given: 0x1000, expected: 0 }),
    ] {
        let error = Tdvf::parse(&Image::join(vars, code)).unwrap_err();
        assert_eq!(error, TdvfError { offset: offset as u64, field: raw, fault });
    }
}

/// Images from before the table have the descriptor's offset from the start at the end.
#[test]
fn the_older_pointer_serves_where_there_is_no_table() {
    let mut image = firmware(SMALL_LEN, &SMALL);
    put(&mut image, SMALL_LEN - 0x30, &[0; 16]);
    let pointer = SMALL_LEN - 0x20;
    put(&mut image, pointer, &u32::try_from(AT).unwrap().to_le_bytes());
    assert_eq!(Tdvf::parse(&Image::new(image.as_slice())).unwrap().offset(), AT as u64);
    for elsewhere in [0, 0xfffe, 0x1_0000, u32::MAX] {
        put(&mut image, pointer, &elsewhere.to_le_bytes());
        check(&image, SMALL_LEN - 0x30, Field::TableFooter, Fault::NoFooter);
    }
}

/// As many sections as may be, none in order: every answer comes soon, and one more section is too many.
#[test]
fn many_sections_are_answered_as_soon_as_few() {
    let page = |index: u64| Entry {
        data_offset: 0,
        raw: 0,
        gpa: (1 << 40) - 0x2000 * (index * 7919 % 2048),
        memory: 0x1000,
        kind: 3,
        attributes: 0,
    };
    let mut sections: Vec<Entry> = SMALL.into_iter().chain((4..1024).map(page)).collect();
    let (len, descriptor) = (0x2_0000, 0x9000);
    let at = |index: usize| len - descriptor + 16 + 32 * index;
    let image = firmware_with_room(len, descriptor, &sections);
    assert_eq!(parse(&Image::new(image)).unwrap().sections().len(), 1024);

    sections[1023].gpa = 0xffff_2000;
    let field = Field::Section { index: 1023, field: SectionField::MemoryAddress };
    let fault = Fault::MemoryOverlap { other: 0, start: Gpa::new(0xffff_2000) };
    check(&firmware_with_room(len, descriptor, &sections), at(1023) + 8, field, fault);

    sections.push(page(5000));
    let fault = Fault::TooManySections { count: 1025, limit: 1024 };
    check(&firmware_with_room(len, descriptor, &sections), at(0) - 4, Field::SectionCount, fault);
}
