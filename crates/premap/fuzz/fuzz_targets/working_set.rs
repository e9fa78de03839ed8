//! Any bytes as a working set: as they are, and with the header and the checksum that would make them one. What is read is
//! what would be written, and puts memory in an order that has every byte once.
//!
//! `cargo +nightly fuzz run working_set`, from the crate's folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use premap::working_set::WorkingSet;
use premap::{Backing, Gpa, GpaRange, Hva, PageSize, Region, Touch};

/// The header's length, and that of a range.
const HEADER: usize = 56;
const RANGE: usize = 16;

fuzz_target!(|data: &[u8]| {
    examine(data);
    examine(&mended(data.to_vec()));
    // The first bytes say which pages and how many ranges; few inputs would agree with themselves otherwise.
    let [kind, body @ ..] = data else { return };
    let page = [4096_u32, 2 << 20, 1 << 30][usize::from(kind % 3)];
    let count = (body.len() / RANGE) as u64;
    let mut file = b"premapWS\x01\0\0\0".to_vec();
    file.extend(page.to_le_bytes());
    file.extend([0; 32]);
    file.extend(count.to_le_bytes());
    assert_eq!(file.len(), HEADER);
    file.extend(&body[..body.len() / RANGE * RANGE]);
    examine(&mended(file));
});

fn mended(mut file: Vec<u8>) -> Vec<u8> {
    file.extend(crc32fast::hash(&file).to_le_bytes());
    file
}

fn examine(file: &[u8]) {
    let set = match WorkingSet::decode(file) {
        Ok(set) => set,
        Err(error) => {
            assert!(error.to_string().contains("working set"));
            return;
        }
    };
    assert_eq!(set.encode(), file);
    let memory = [
        region(0, 3 << 30, Backing::Anonymous),
        region(4 << 30, 8 << 30, Backing::Hugetlb(PageSize::Size2M)),
    ];
    if let Ok(ordered) = set.first(&set.identity(), &memory) {
        let mut ranges: Vec<_> = ordered.iter().map(|region| region.range).collect();
        assert_eq!(ranges.iter().map(|range| range.bytes()).sum::<u64>(), 11 << 30);
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start()));
        assert!(set.bytes() <= 11 << 30);
        premap::Plan::new(ordered).expect("regions of sound memory make a plan");
    }
}

fn region(gpa: u64, bytes: u64, backing: Backing) -> Region {
    let range = GpaRange::new(Gpa::new(gpa), bytes);
    Region { range, host: Hva::new((1 << 40) + gpa), backing, touch: Touch::Write }
}
