//! What a caller gives: levels, and guest-physical pages with a level.

use std::fmt;
use std::ops::RangeInclusive;

use premap_address::{Gpa, PAGE_SHIFT};

/// log2 of a table's entries. Models have tables of four.
pub(crate) const INDEX_BITS: u32 = if cfg!(loom) { 2 } else { 9 };
/// How many entries a table has.
pub(crate) const ENTRIES: usize = 1 << INDEX_BITS;

/// The level of a Secure-EPT entry, as the module counts: an entry of level 0 maps 4 KiB, and a table's entries are of one
/// level less than the entry that points to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// An entry of a page table: 4 KiB.
    pub const PT: Self = Self(0);
    /// An entry of a page directory: 2 MiB.
    pub const PD: Self = Self(1);
    /// 1 GiB.
    pub const PDPT: Self = Self(2);
    /// 512 GiB: the root's entries where the Secure-EPT has four levels.
    pub const PML4: Self = Self(3);
    /// 256 TiB: the root's entries where it has five.
    pub const PML5: Self = Self(4);

    /// The level of this number, or `None` beyond 4.
    #[must_use]
    pub const fn new(raw: u8) -> Option<Self> {
        if raw <= Self::PML5.0 { Some(Self(raw)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn raw(self) -> u8 {
        self.0
    }

    /// How many bytes an entry of this level covers.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// How many 4 KiB pages an entry of this level covers.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.bytes() >> PAGE_SHIFT
    }

    /// The level of the table's entries that an entry of this level points to.
    #[must_use]
    pub const fn below(self) -> Option<Self> {
        match self.0.checked_sub(1) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    const fn shift(self) -> u32 {
        PAGE_SHIFT + INDEX_BITS * self.0 as u32
    }

    /// Which entry of its table an address has at this level.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the mask leaves a few bits")]
    pub(crate) const fn index(self, gpa: Gpa) -> usize {
        (gpa.raw() >> self.shift()) as usize & (ENTRIES - 1)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// RCX of the MEM calls: a guest-physical address in bits 51:12 and a level in bits 2:0. Bits 11:3 and 63:52 must be zero, and
/// the address aligned to what an entry of that level covers.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageInfo(u64);

impl PageInfo {
    const LEVEL: u64 = 0b111;
    const RESERVED: u64 = 0xfff0_0000_0000_0ff8;

    /// Puts address and level together, unchecked: the call will tell.
    #[must_use]
    pub const fn new(gpa: Gpa, level: Level) -> Self {
        Self(gpa.raw() | level.0 as u64)
    }

    /// A 4 KiB page.
    #[must_use]
    pub const fn page(gpa: Gpa) -> Self {
        Self::new(gpa, Level::PT)
    }

    /// The register's value, whatever it is.
    #[must_use]
    pub const fn from_raw(rcx: u64) -> Self {
        Self(rcx)
    }

    /// The register's value.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Address and level, if the value is well formed and the level one of these.
    pub(crate) fn parse(self, levels: &RangeInclusive<Level>) -> Option<(Gpa, Level)> {
        let level = u8::try_from(self.0 & Self::LEVEL).ok().and_then(Level::new)?;
        let gpa = Gpa::new(self.0 & !Self::LEVEL);
        let aligned = gpa.raw().is_multiple_of(level.bytes());
        (self.0 & Self::RESERVED == 0 && levels.contains(&level) && aligned).then_some((gpa, level))
    }
}

impl fmt::Debug for PageInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageInfo({:#x})", self.0)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn pages_are_parsed_if_well_formed_and_of_a_level_allowed() {
        let parse = |raw| PageInfo::from_raw(raw).parse(&(Level::PT..=Level::PD));
        assert_eq!(parse(0x1000), Some((Gpa::new(0x1000), Level::PT)));
        assert_eq!(parse(0x20_0001), Some((Gpa::new(0x20_0000), Level::PD)));
        for wrong in [0x1008, 0x1800, 0x1001, 0x4000_0002, 0x4000_0005, 0x4000_0007, 1 << 52] {
            assert_eq!(parse(wrong), None, "{wrong:#x}");
        }
    }

    #[test]
    fn levels_cover_what_the_specification_says() {
        assert_eq!(Level::PT.bytes(), 4096);
        assert_eq!(Level::PD.bytes(), 2 << 20);
        assert_eq!((Level::PDPT.pages(), Level::PML4.bytes()), (1 << 18, 512 << 30));
        assert_eq!((Level::new(4), Level::new(5)), (Some(Level::PML5), None));
        assert_eq!(Level::PD.index(Gpa::new(0x40_1000)), 2);
    }
}
