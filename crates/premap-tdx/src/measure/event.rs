//! The operations that a measurement consists of, one after the other.

use std::ops::Range;

use premap_address::{Gpa, PAGE_SIZE};

use super::rules::{Order, Rules};
use crate::tdvf::Section;

/// How much content one EXTEND measures.
pub const CHUNK: usize = 256;
const CHUNK_BYTES: u64 = CHUNK as u64;
const CHUNKS_IN_PAGE: u64 = PAGE_SIZE / CHUNK_BYTES;

/// The content of one EXTEND: 256 bytes, of which those after the section's data are zero and not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk<'a>(&'a [u8]);

impl<'a> Chunk<'a> {
    /// The first 256 bytes at most of `data`; zeros follow where it has fewer.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self(data.get(..CHUNK).unwrap_or(data))
    }

    /// The bytes that are stored, 256 at most.
    #[must_use]
    pub fn stored(self) -> &'a [u8] {
        self.0
    }

    /// All 256 bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; CHUNK] {
        let mut bytes = [0; CHUNK];
        if let Some(stored) = bytes.get_mut(..self.0.len()) {
            stored.copy_from_slice(self.0);
        }
        bytes
    }
}

/// An operation that feeds the MRTD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// TDH.MEM.PAGE.ADD of a 4 KiB page.
    Add {
        /// The page.
        gpa: Gpa,
        /// Its section, counted from 0.
        section: usize,
    },
    /// TDH.MR.EXTEND of 256 bytes.
    Extend {
        /// The first byte.
        gpa: Gpa,
        /// Its section, counted from 0.
        section: usize,
        /// The bytes.
        content: Chunk<'a>,
    },
}

impl Event<'_> {
    /// The address that the operation is about.
    #[must_use]
    pub const fn gpa(&self) -> Gpa {
        match *self {
            Self::Add { gpa, .. } | Self::Extend { gpa, .. } => gpa,
        }
    }

    /// The section that the address belongs to, counted from 0.
    #[must_use]
    pub const fn section(&self) -> usize {
        match *self {
            Self::Add { section, .. } | Self::Extend { section, .. } => section,
        }
    }
}

/// The operations of a VMM that loads these sections by these rules.
pub fn events<'a>(sections: &'a [Section<'a>], rules: Rules) -> impl Iterator<Item = Event<'a>> {
    let loaded = sections.iter().enumerate().filter(move |(_, section)| rules.loads(section));
    loaded.flat_map(move |(index, section)| of_section(index, section, rules.order))
}

/// Goes through a section in groups of pages: a group's pages are all added, then all measured. The order is the group's
/// size: a page, or the whole section.
fn of_section<'a>(index: usize, section: &'a Section<'a>, order: Order) -> impl Iterator<Item = Event<'a>> {
    let pages = section.memory().pages();
    let group = match order {
        Order::Page => 1,
        Order::Region => pages,
    };
    let at = |bytes| section.memory().start().wrapping_add(bytes);
    let add = move |page| Event::Add { gpa: at(page * PAGE_SIZE), section: index };
    let extend = move |chunk| {
        let offset = chunk * CHUNK_BYTES;
        let data = usize::try_from(offset).ok().and_then(|offset| section.data().get(offset..));
        Event::Extend { gpa: at(offset), section: index, content: Chunk::new(data.unwrap_or_default()) }
    };
    (0..pages / group).flat_map(move |number| {
        let pages = number * group..(number + 1) * group;
        let measured = if section.is_measured() { chunks(&pages) } else { 0..0 };
        pages.map(add).chain(measured.map(extend))
    })
}

/// The pieces that cover these pages.
fn chunks(pages: &Range<u64>) -> Range<u64> {
    pages.start * CHUNKS_IN_PAGE..pages.end * CHUNKS_IN_PAGE
}
