//! Ranges of host-physical memory.

use std::fmt;

use premap_address::{Hpa, PAGE_SIZE, PageSize, Pfn};

/// A range of host-physical memory: 4 KiB-aligned at both ends, never empty, below 2^52.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HpaRange {
    start: Hpa,
    bytes: u64,
}

impl HpaRange {
    /// Makes a range, or gives `None` if it is unaligned to 4 KiB, empty, or reaches beyond 2^52.
    #[must_use]
    pub fn new(start: Hpa, bytes: u64) -> Option<Self> {
        let end = start.checked_add(bytes)?;
        let aligned = start.is_aligned(PageSize::Size4K) && bytes.is_multiple_of(PAGE_SIZE);
        (aligned && bytes > 0 && end.raw() <= 1 << 52).then_some(Self { start, bytes })
    }

    /// The first byte's address.
    #[must_use]
    pub const fn start(self) -> Hpa {
        self.start
    }

    /// The length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// The address just past the last byte.
    #[must_use]
    pub const fn end(self) -> Hpa {
        self.start.wrapping_add(self.bytes)
    }

    /// The length in 4 KiB pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes / PAGE_SIZE
    }

    /// The range's pages in order.
    pub fn frames(self) -> impl Iterator<Item = Pfn> + use<> {
        let first = self.start.frame().number();
        (first..first + self.pages()).map(Pfn::new)
    }

    /// Whether all of `other` lies in this range.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the ranges have a page in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Debug for HpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end())
    }
}

impl fmt::Display for HpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
