//! What is written is read back, and nothing else is read.

use premap::working_set::{Identity, Malformed, Touched, WorkingSet};
use premap::{Gpa, GpaRange, PageSize, Touch};
use proptest::prelude::*;

/// The length of the checksum at a file's end.
const CHECKSUM: usize = 4;

fn range(page: u64, pages: u64, touch: Touch) -> Touched {
    Touched { range: GpaRange::new(Gpa::new(page << 12), pages << 12), touch }
}

fn set() -> WorkingSet {
    let touched = vec![range(9, 2, Touch::Write), range(1, 1, Touch::Read), range(2, 1, Touch::Write)];
    WorkingSet::new(Identity([7; 32]), PageSize::Size4K, touched).unwrap()
}

/// Changes a good file, mends its checksum, and expects an error.
#[track_caller]
fn check(change: impl FnOnce(&mut Vec<u8>), expected: &str) {
    let mut file = set().encode();
    file.truncate(file.len() - CHECKSUM);
    change(&mut file);
    file.extend(crc32fast::hash(&file).to_le_bytes());
    let error = WorkingSet::decode(&file).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn what_a_file_must_not_hold_is_refused_by_name() {
    let put = |at: usize, value: u64| {
        move |file: &mut Vec<u8>| file[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    check(|file| file[0] = b'P', "not a working set");
    check(|file| file[8] = 2, "of version 2");
    check(|file| file[12] = 1, "pages of 4097 bytes");
    check(|file| file[14] = 0x20, "pages of 2101248 bytes");
    check(put(12, 2 << 20), "inside a page of 2 MiB");
    check(put(48, 4), "cut short: 108 bytes of 124");
    check(put(48, 2), "of 92 bytes with 108");
    check(put(48, u64::MAX), "cut short");
    check(put(56, 0x9003), "an address that means nothing, 0x9003");
    check(put(64, 0), "is empty");
    check(put(64, 0x1001), "not a multiple of 4 KiB");
    check(put(56, !0xfff), "beyond 2^64");
    check(put(72, 0xa000), "overlap");
}

#[test]
fn every_part_of_a_file_is_refused_as_one() {
    let file = set().encode();
    assert_eq!(WorkingSet::decode(&file), Ok(set()));
    assert_eq!(WorkingSet::decode(b""), Err(Malformed::NotAWorkingSet));
    for length in 1..file.len() {
        let error = WorkingSet::decode(&file[..length]).unwrap_err();
        assert!(matches!(error, Malformed::Truncated { .. }), "{length} bytes: {error}");
    }
    assert!(matches!(WorkingSet::decode(&[&file[..], b"x"].concat()), Err(Malformed::TrailingBytes { .. })));
}

#[test]
fn every_flipped_bit_is_told() {
    let good = set().encode();
    for bit in 0..good.len() * 8 {
        let mut file = good.clone();
        file[bit / 8] ^= 1 << (bit % 8);
        assert!(WorkingSet::decode(&file).is_err(), "bit {bit} went unnoticed");
    }
}

/// Working sets of any page size: ranges apart from each other, in any order.
fn sets() -> impl Strategy<Value = WorkingSet> {
    let range = (1..1000_u64, 1..1000_u64, any::<bool>());
    let ranges = prop::collection::vec(range, 0..40).prop_flat_map(|gaps| Just(gaps).prop_shuffle());
    (any::<[u8; 32]>(), prop::sample::select(PageSize::ALL.to_vec()), ranges, any::<u64>()).prop_map(
        |(identity, page, gaps, seed)| {
            let mut at = 0;
            let mut touched = Vec::new();
            for (gap, pages, written) in gaps {
                at += gap;
                let range = GpaRange::new(Gpa::new(at * page.bytes()), pages * page.bytes());
                at += pages;
                touched.push(Touched { range, touch: if written { Touch::Write } else { Touch::Read } });
            }
            touched.sort_by_key(|touched| touched.range.start().raw().wrapping_mul(seed | 1));
            WorkingSet::new(Identity(identity), page, touched).unwrap()
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(set in sets()) {
        prop_assert_eq!(WorkingSet::decode(&set.encode()), Ok(set));
    }

    #[test]
    fn bytes_that_pass_are_what_they_would_be_written_as(
        head in prop::collection::vec(any::<u8>(), 0..200),
        mend in any::<bool>(),
    ) {
        let mut file = set().encode();
        let length = head.len().min(file.len());
        file[length - head.len().min(length)..length].copy_from_slice(&head[..length]);
        if mend {
            file.truncate(file.len() - CHECKSUM);
            file.extend(crc32fast::hash(&file).to_le_bytes());
        }
        if let Ok(set) = WorkingSet::decode(&file) {
            prop_assert_eq!(set.encode(), file);
        }
    }
}
