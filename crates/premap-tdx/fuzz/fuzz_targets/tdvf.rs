//! Any bytes as a firmware image: whole, and cut in two and joined again. Sections that come of it must be sound.
//!
//! `cargo +nightly fuzz run tdvf fuzz/corpus/tdvf fuzz/seeds`, from the crate's folder. `fuzz/run.sh SECONDS` does the same
//! with a stable toolchain and without cargo-fuzz.
#![no_main]

use libfuzzer_sys::fuzz_target;
use premap_tdx::measure::write_events;
use premap_tdx::tdvf::MAX_MEMORY;
use premap_tdx::{Image, Order, Rules, TdHob, Tdvf, measure};

fuzz_target!(|data: &[u8]| {
    examine(&Image::new(data));
    if let Some((&cut, data)) = data.split_first() {
        let (vars, code) = data.split_at(data.len() * usize::from(cut) / 256);
        examine(&Image::join(vars, code));
    }
});

fn examine(image: &Image<'_>) {
    let tdvf = match Tdvf::parse(image) {
        Ok(tdvf) => tdvf,
        Err(error) => {
            assert!(error.to_string().contains("offset"));
            return;
        }
    };
    let sections = tdvf.sections();
    let mut pages = 0;
    for (index, section) in sections.iter().enumerate() {
        let memory = section.memory();
        pages += memory.pages();
        assert!(section.data().len() as u64 <= memory.bytes());
        for other in &sections[..index] {
            assert_eq!(memory.intersection(other.memory()), None);
        }
    }
    assert!(pages * 4096 <= MAX_MEMORY);
    // Few pages find what many would, and sooner.
    if pages <= 16 {
        for order in Order::ALL {
            let measured = measure(sections, Rules::from(order));
            assert_eq!(measured.adds, pages);
            assert_eq!(write_events(sections, order.into(), &mut std::io::sink()).ok(), Some(measured));
        }
    }
    for bytes in [0x90_0000, 0x8000_0000, 3 << 32] {
        if let Ok(hob) = TdHob::q35(&tdvf, bytes) {
            let told: u64 = hob.resources().iter().map(|resource| resource.range.bytes()).sum();
            assert_eq!(told, bytes);
        }
    }
}
