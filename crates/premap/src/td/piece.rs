//! What a TD is made of when it starts.

use std::borrow::Cow;

use premap_address::{GpaRange, PAGE_SIZE};
use premap_tdx::{TdHob, Tdvf};

/// Memory that is added to a TD before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Where the guest sees it.
    pub range: GpaRange,
    /// What it holds, from its start on; what is left of the range is zeroes.
    pub content: Cow<'a, [u8]>,
    /// Whether the content is part of the measurement.
    pub measured: bool,
}

impl<'a> Piece<'a> {
    /// The sections of a firmware in their order, with the TD HOB in its place.
    #[must_use]
    pub fn of_firmware(tdvf: &Tdvf<'a>, hob: &TdHob) -> Vec<Self> {
        let piece = |section: &premap_tdx::Section<'a>| {
            let range = section.memory();
            let is_hob = range.start() == hob.gpa();
            let content =
                if is_hob { Cow::Owned(hob.bytes().to_vec()) } else { Cow::Borrowed(section.data()) };
            Self { range, content, measured: section.is_measured() }
        };
        tdvf.sections().iter().map(piece).collect()
    }

    /// The content as whole pages, which is how KVM wants its source.
    pub(super) fn pages(&self) -> Vec<Page> {
        let count = usize::try_from(self.range.pages()).unwrap_or(usize::MAX);
        let mut pages = vec![Page::ZERO; count];
        let page = usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX);
        for (page, content) in pages.iter_mut().zip(self.content.chunks(page)) {
            page.0[..content.len()].copy_from_slice(content);
        }
        pages
    }
}

/// A page of a source.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
pub(super) struct Page([u8; 4096]);

impl Page {
    const ZERO: Self = Self([0; 4096]);
}
