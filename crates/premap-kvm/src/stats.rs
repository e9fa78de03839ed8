//! KVM's binary statistics: what `KVM_GET_STATS_FD` gives, parsed.
//!
//! The file is a header, then a name and a descriptor for each statistic, then the values:
//!
//! ```text
//!  header: flags u32 | name_size u32 | num_desc u32 | id_offset u32 | desc_offset u32 | data_offset u32
//!  desc:   flags u32 | exponent i16 | size u16 | offset u32 | bucket_size u32 | name [u8; name_size]
//!  data:   size values of u64 at data_offset + desc.offset
//! ```
//!
//! Source: the kernel's `Documentation/virt/kvm/api.rst`, section `KVM_GET_STATS_FD`.

use std::collections::BTreeMap;

const DESCRIPTOR: usize = 16;

/// Statistics by name, as they stood when they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats(BTreeMap<String, Vec<u64>>);

/// Why bytes are no statistics file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What lies outside the file.
    pub what: &'static str,
    /// Where it was said to be, in bytes from the start.
    pub offset: usize,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed KVM statistics: the {} at byte {} lies outside the file", self.what, self.offset)
    }
}

impl std::error::Error for Malformed {}

impl Stats {
    /// The value of a statistic, or its first bucket; `None` where the kernel has no such statistic.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.first().copied()
    }

    /// Every bucket of a statistic.
    #[must_use]
    pub fn buckets(&self, name: &str) -> Option<&[u64]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// Names and values in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u64])> {
        self.0.iter().map(|(name, values)| (name.as_str(), values.as_slice()))
    }

    /// Parses a whole statistics file.
    ///
    /// # Errors
    /// Where a part lies outside the bytes given.
    pub fn parse(file: &[u8]) -> Result<Self, Malformed> {
        let word = |what, offset| array(file, what, offset).map(|bytes| u32::from_ne_bytes(bytes) as usize);
        let (name_size, count) = (word("header", 4)?, word("header", 8)?);
        let (descriptors, data) = (word("header", 16)?, word("header", 20)?);
        let mut stats = BTreeMap::new();
        for index in 0..count {
            let at = index.saturating_mul(DESCRIPTOR.saturating_add(name_size)).saturating_add(descriptors);
            let size = usize::from(u16::from_ne_bytes(array(file, "descriptor", at.saturating_add(6))?));
            let first = word("descriptor", at.saturating_add(8))?.saturating_add(data);
            let name = part(file, "name", at.saturating_add(DESCRIPTOR), name_size)?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let values = (0..size)
                .map(|bucket| array(file, "value", first.saturating_add(8 * bucket)).map(u64::from_ne_bytes))
                .collect::<Result<_, _>>()?;
            stats.insert(String::from_utf8_lossy(name).into_owned(), values);
        }
        Ok(Self(stats))
    }
}

fn part<'a>(file: &'a [u8], what: &'static str, offset: usize, len: usize) -> Result<&'a [u8], Malformed> {
    let end = offset.checked_add(len).ok_or(Malformed { what, offset })?;
    file.get(offset..end).ok_or(Malformed { what, offset })
}

fn array<const N: usize>(file: &[u8], what: &'static str, offset: usize) -> Result<[u8; N], Malformed> {
    part(file, what, offset, N)?.first_chunk().copied().ok_or(Malformed { what, offset })
}

impl<N: Into<String>> FromIterator<(N, u64)> for Stats {
    fn from_iter<I: IntoIterator<Item = (N, u64)>>(stats: I) -> Self {
        Self(stats.into_iter().map(|(name, value)| (name.into(), vec![value])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of two statistics, laid out as the kernel does: header, id, descriptors, values.
    fn file() -> Vec<u8> {
        let (name_size, id) = (16_u32, 24_u32);
        let descriptors = id + name_size;
        let data = descriptors + 2 * (16 + name_size);
        let mut file = Vec::new();
        for word in [0, name_size, 2, id, descriptors, data] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(*b"kvm-1/vcpu-0\0\0\0\0");
        for (name, size, offset) in
            [(b"pf_taken\0\0\0\0\0\0\0\0", 1_u16, 0_u32), (b"halt_wait_hist\0\0", 2, 8)]
        {
            file.extend([0; 6]);
            file.extend(size.to_ne_bytes());
            file.extend(offset.to_ne_bytes());
            file.extend([0; 4]);
            file.extend(name);
        }
        for value in [8_004_u64, 3, 4] {
            file.extend(value.to_ne_bytes());
        }
        file
    }

    #[test]
    fn values_are_found_by_name() {
        let stats = Stats::parse(&file()).unwrap();
        assert_eq!(stats.get("pf_taken"), Some(8_004));
        assert_eq!(stats.buckets("halt_wait_hist"), Some(&[3, 4][..]));
        assert_eq!(stats.get("absent"), None);
        assert_eq!(stats.iter().count(), 2);
    }

    #[test]
    fn every_truncation_is_an_error_and_no_panic() {
        let file = file();
        for length in 0..file.len() {
            assert!(Stats::parse(&file[..length]).is_err(), "{length} bytes were taken for a whole file");
        }
    }

    #[test]
    fn every_corrupt_byte_is_read_without_a_panic() {
        let whole = file();
        for at in 0..whole.len() {
            for bits in [0x01, 0x80, 0xff] {
                let mut file = whole.clone();
                file[at] ^= bits;
                // Either an error or other values: both are answers.
                if let Ok(stats) = Stats::parse(&file) {
                    assert!(stats.iter().count() <= 2, "byte {at} made statistics out of nothing");
                }
            }
        }
    }

    #[test]
    fn a_header_that_claims_too_much_is_refused() {
        let mut file = file();
        file[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(Stats::parse(&file).is_err());
        file[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(Stats::parse(&file).unwrap_err().what, "name");
    }
}
