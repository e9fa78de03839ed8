//! A working set as bytes: the format that the module's documentation states.

use premap_address::{Gpa, GpaRange, PageSize};

use super::error::Malformed;
use super::{Identity, Touched, WorkingSet};
use crate::memory::Touch;

const MAGIC: &[u8; 8] = b"premapWS";
const VERSION: u32 = 1;
const HEADER: usize = 56;
const RANGE: usize = 16;
const CHECKSUM: usize = 4;
/// In a range's address: the guest wrote there.
const WRITTEN: u64 = 1;

impl WorkingSet {
    /// The working set as a file's content.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.touched.len() * RANGE + CHECKSUM);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        // 1 GiB at most, so it fits.
        bytes.extend(u32::try_from(self.page.bytes()).unwrap_or_default().to_le_bytes());
        bytes.extend(self.identity.0);
        bytes.extend((self.touched.len() as u64).to_le_bytes());
        for Touched { range, touch } in &self.touched {
            let written = if *touch == Touch::Write { WRITTEN } else { 0 };
            bytes.extend((range.start().raw() | written).to_le_bytes());
            bytes.extend(range.bytes().to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// Whatever makes the bytes no working set: another version, a part of one, a flipped bit, ranges that can't be.
    pub fn decode(file: &[u8]) -> Result<Self, Malformed> {
        let bytes = file.len() as u64;
        let short = || Malformed::Truncated { bytes, expected: (HEADER + CHECKSUM) as u64 };
        let magic = file.get(..MAGIC.len().min(file.len())).unwrap_or_default();
        if !MAGIC.starts_with(magic) || magic.is_empty() {
            return Err(Malformed::NotAWorkingSet);
        }
        let version = u32::from_le_bytes(array(file, 8).ok_or_else(short)?);
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let count = u64::from_le_bytes(array(file, 48).ok_or_else(short)?);
        let expected = count.saturating_mul(RANGE as u64).saturating_add((HEADER + CHECKSUM) as u64);
        if bytes < expected {
            return Err(Malformed::Truncated { bytes, expected });
        }
        if bytes > expected {
            return Err(Malformed::TrailingBytes { bytes, expected });
        }
        let (content, checksum) = file.split_last_chunk::<CHECKSUM>().ok_or_else(short)?;
        let (found, computed) = (u32::from_le_bytes(*checksum), crc32fast::hash(content));
        if found != computed {
            return Err(Malformed::Checksum { found, computed });
        }
        let page = u32::from_le_bytes(array(file, 12).ok_or_else(short)?);
        let size = PageSize::ALL.into_iter().find(|size| size.bytes() == u64::from(page));
        let size = size.ok_or(Malformed::PageSize(page))?;
        let identity = Identity(array(file, 16).ok_or_else(short)?);
        let ranges = content.get(HEADER..).unwrap_or_default();
        let touched = ranges.as_chunks::<RANGE>().0.iter().map(touched).collect::<Result<_, _>>()?;
        Self::new(identity, size, touched).map_err(Malformed::Content)
    }
}

fn touched(bytes: &[u8; RANGE]) -> Result<Touched, Malformed> {
    let word = |at: usize| array(bytes, at).map_or(0, u64::from_le_bytes);
    let (address, bytes) = (word(0), word(8));
    let touch = if address & WRITTEN != 0 { Touch::Write } else { Touch::Read };
    let start = Gpa::new(address & !WRITTEN);
    if !start.is_aligned(PageSize::Size4K) {
        return Err(Malformed::Address(Gpa::new(address)));
    }
    let range = GpaRange::try_new(start, bytes).map_err(Malformed::Range)?;
    Ok(Touched { range, touch })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        assert!(matches!(
            WorkingSet::decode(&[&file[..], b"x"].concat()),
            Err(Malformed::TrailingBytes { .. })
        ));
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
}
