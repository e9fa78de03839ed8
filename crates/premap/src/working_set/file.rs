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
