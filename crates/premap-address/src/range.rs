//! Ranges of guest-physical memory.

use core::fmt;

use crate::address::Gpa;
use crate::page::{PAGE_SIZE, PageSize};

/// A range of guest-physical memory: 4 KiB-aligned at both ends, never empty, never wrapping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct GpaRange {
    gpa: Gpa,
    bytes: u64,
}

/// Why a start and a length make no [`GpaRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeError {
    /// The start is not on a 4 KiB boundary.
    UnalignedStart(Gpa),
    /// The length is not a multiple of 4 KiB.
    UnalignedLength(u64),
    /// The length is zero.
    Empty(Gpa),
    /// The end lies beyond 2^64.
    Wraps(Gpa, u64),
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnalignedStart(gpa) => write!(f, "gpa {gpa} is not on a 4 KiB boundary"),
            Self::UnalignedLength(bytes) => write!(f, "length {bytes:#x} is not a multiple of 4 KiB"),
            Self::Empty(gpa) => write!(f, "the range at gpa {gpa} is empty"),
            Self::Wraps(gpa, bytes) => write!(f, "{bytes:#x} bytes from gpa {gpa} reach beyond 2^64"),
        }
    }
}

impl core::error::Error for RangeError {}

impl GpaRange {
    /// Makes a range from its start and its length in bytes.
    ///
    /// # Errors
    /// Start or length unaligned to 4 KiB, length zero, or an end beyond 2^64.
    pub const fn try_new(gpa: Gpa, bytes: u64) -> Result<Self, RangeError> {
        if !gpa.is_aligned(PageSize::Size4K) {
            Err(RangeError::UnalignedStart(gpa))
        } else if !bytes.is_multiple_of(PAGE_SIZE) {
            Err(RangeError::UnalignedLength(bytes))
        } else if bytes == 0 {
            Err(RangeError::Empty(gpa))
        } else if gpa.checked_add(bytes).is_none() {
            Err(RangeError::Wraps(gpa, bytes))
        } else {
            Ok(Self { gpa, bytes })
        }
    }

    /// Makes a range from a start and a length known to be good.
    ///
    /// # Panics
    /// Where [`try_new`](Self::try_new) gives an error.
    #[must_use]
    #[track_caller]
    pub fn new(gpa: Gpa, bytes: u64) -> Self {
        match Self::try_new(gpa, bytes) {
            Ok(range) => range,
            Err(error) => panic!("{error}"),
        }
    }

    /// The first byte's address.
    #[must_use]
    pub const fn start(self) -> Gpa {
        self.gpa
    }

    /// The address just past the last byte.
    #[must_use]
    pub const fn end(self) -> Gpa {
        self.gpa.wrapping_add(self.bytes)
    }

    /// The length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// The length in 4 KiB pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes / PAGE_SIZE
    }

    /// Whether the address lies in the range.
    #[must_use]
    pub const fn contains(self, gpa: Gpa) -> bool {
        match gpa.checked_offset_from(self.gpa) {
            Some(offset) => offset < self.bytes,
            None => false,
        }
    }

    /// The part that both ranges have, if any.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start().max(other.start());
        let end = self.end().min(other.end());
        let bytes = end.checked_offset_from(start)?;
        (bytes > 0).then_some(Self { gpa: start, bytes })
    }

    /// Both ranges as one, or `None` unless `next` starts where this one ends.
    #[must_use]
    pub fn join(self, next: Self) -> Option<Self> {
        (self.end() == next.start()).then_some(Self { gpa: self.gpa, bytes: self.bytes + next.bytes })
    }

    /// Cuts the range in two `bytes` after its start, or `None` if either part would be empty or unaligned.
    #[must_use]
    pub fn split_at(self, bytes: u64) -> Option<(Self, Self)> {
        let rest = self.bytes.checked_sub(bytes)?;
        let head = Self::try_new(self.gpa, bytes).ok()?;
        let tail = Self::try_new(self.gpa.checked_add(bytes)?, rest).ok()?;
        Some((head, tail))
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start(), self.end())
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_range_is_refused_with_the_value() {
        let refused = |gpa, bytes| GpaRange::try_new(Gpa::new(gpa), bytes).unwrap_err();
        assert_eq!(refused(1, 0x1000), RangeError::UnalignedStart(Gpa::new(1)));
        assert_eq!(refused(0, 0x1001), RangeError::UnalignedLength(0x1001));
        assert_eq!(refused(0x1000, 0), RangeError::Empty(Gpa::new(0x1000)));
        assert_eq!(refused(!0xfff, 0x1000), RangeError::Wraps(Gpa::new(!0xfff), 0x1000));
    }

    #[test]
    #[should_panic(expected = "not a multiple of 4 KiB")]
    fn new_panics_with_the_reason() {
        let _ = GpaRange::new(Gpa::new(0), 3);
    }

    #[test]
    fn intersection_and_split_keep_every_byte() {
        let range = GpaRange::new(Gpa::new(0x1000), 0x4000);
        let other = GpaRange::new(Gpa::new(0x3000), 0x8000);
        assert_eq!(range.intersection(other), Some(GpaRange::new(Gpa::new(0x3000), 0x2000)));
        assert_eq!(range.intersection(GpaRange::new(Gpa::new(0x5000), 0x1000)), None);
        let (head, tail) = range.split_at(0x1000).unwrap();
        assert_eq!((head.end(), head.bytes() + tail.bytes()), (tail.start(), range.bytes()));
        assert_eq!((head.join(tail), tail.join(head)), (Some(range), None));
        assert_eq!(range.split_at(0x4000), None);
        assert_eq!(range.split_at(0x800), None);
    }
}
