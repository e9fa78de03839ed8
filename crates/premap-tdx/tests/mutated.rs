//! Images changed at random: whatever comes of them, it comes without a panic, and sections that come are sound.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use common::{DESCRIPTOR, SMALL, SMALL_LEN, firmware, put};
use premap_tdx::tdvf::MAX_MEMORY;
use premap_tdx::{Image, Order, Rules, TdHob, Tdvf, measure};
use proptest::prelude::*;

/// What parsing promises of every section that it gives.
fn sound(image: &Image<'_>) {
    let Ok(tdvf) = Tdvf::parse(image) else { return };
    let (mut total, mut extends) = (0, 0);
    for section in tdvf.sections() {
        let memory = section.memory();
        assert!(section.data().len() as u64 <= memory.bytes());
        let start = usize::try_from(section.data_offset()).unwrap();
        assert!(section.data().is_empty() || image.bytes()[start..].starts_with(section.data()));
        assert!(memory.end().raw() <= 1 << 51);
        total += memory.pages();
        extends += if section.is_measured() { memory.pages() * 16 } else { 0 };
    }
    assert!(total * 4096 <= MAX_MEMORY);
    for (index, one) in tdvf.sections().iter().enumerate() {
        for other in &tdvf.sections()[..index] {
            assert_eq!(one.memory().intersection(other.memory()), None);
        }
    }
    // As much as a moment allows: what counts for few pages counts for many.
    if total < 0x400 && extends < 0x400 {
        for order in Order::ALL {
            let measured = measure(tdvf.sections(), Rules::from(order));
            assert_eq!((measured.adds, measured.extends), (total, extends));
        }
    }
    for bytes in [0x1000, 0x8080_0000, 0xb000_0000, 1 << 40] {
        if let Ok(hob) = TdHob::q35(&tdvf, bytes) {
            let ram: u64 = hob.resources().iter().map(|resource| resource.range.bytes()).sum();
            assert_eq!(ram, bytes);
        }
    }
}

/// Where changes matter most: the descriptor with its GUID, the table, and anywhere.
fn place() -> impl Strategy<Value = usize> {
    let descriptor = SMALL_LEN - DESCRIPTOR;
    prop_oneof![
        4 => descriptor + 16..descriptor + 16 + 32 * SMALL.len(),
        2 => descriptor - 16..descriptor + 16,
        3 => SMALL_LEN - 0x60..SMALL_LEN - 0x20,
        1 => 0..SMALL_LEN,
    ]
}

/// Bytes that tend to be wrong in the ways that count: extremes, page multiples, neighbours of what is right.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        prop_oneof![Just(0_u32), Just(u32::MAX), Just(0x1000), any::<u32>()]
            .prop_map(|word| word.to_le_bytes().into()),
        (0..64_u32, -1..=1_i64)
            .prop_map(|(bit, by)| (1_u64 << bit).wrapping_add_signed(by).to_le_bytes().into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_image_never_panics(changes in prop::collection::vec((place(), bytes()), 1..6), cut in 0..0x3000_usize) {
        let mut image = firmware(SMALL_LEN, &SMALL);
        for (at, bytes) in changes {
            let at = at.min(SMALL_LEN - bytes.len());
            put(&mut image, at, &bytes);
        }
        sound(&Image::new(image.as_slice()));
        let (vars, code) = image.split_at(cut);
        sound(&Image::new(code));
        sound(&Image::join(vars, code));
    }

    #[test]
    fn bytes_of_no_firmware_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        sound(&Image::new(bytes.as_slice()));
        // The same with a footer, so that the walk begins.
        let mut bytes = bytes;
        if let Some(footer) = bytes.len().checked_sub(0x30) {
            put(&mut bytes, footer, &common::FOOTER_GUID);
            sound(&Image::new(bytes.as_slice()));
        }
    }
}
