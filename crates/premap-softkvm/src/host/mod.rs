//! What the host's page tables say of a range of virtual memory, and how a page is got that is not there.
//!
//! Linux's KVM looks a page up in the host's page tables and is told of changes by an MMU notifier. A user-space KVM has
//! neither, so it asks. Three questions, each with one interface of the kernel and a fallback:
//!
//! | question | asked of | where that is missing |
//! |---|---|---|
//! | what mapping covers this address, with what permissions | [`vma`]: `PROCMAP_QUERY`, Linux 6.11 | the text of `/proc/self/maps` |
//! | which pages are present, zero, huge | [`pages`]: `PAGEMAP_SCAN`, Linux 6.7 | `/proc/self/pagemap`; huge pages are then taken for small ones |
//! | is a private page ours alone | [`pages`]: `/proc/self/pagemap`, bit 56 | never missing |
//!
//! An answer is true only for the moment it was given. Who uses one must hold an invalidation sequence number taken
//! *before* it was asked for, and check that number before acting on the answer (see `notifier`).
//!
//! **A page is host-writable** when the processor could write it without a fault: in a writable mapping, present, and
//! either of a shared mapping or a private page that is ours alone. The zero page, the page cache under a private file
//! mapping and pages shared by fork or KSM are present but not writable: a write must copy them first.
//!
//! Getting a page is `MADV_POPULATE_READ` or `_WRITE`: what a touch would do, with an errno where a touch would be a signal.

mod getter;
mod pages;
mod populate;
mod vma;

use std::ops::Range;

use premap_address::{Hva, PAGE_SIZE, PageSize};
use premap_kvm::Errno;

pub(crate) use getter::Getter;
pub(crate) use pages::Exclusivity;
pub(crate) use populate::Failure;

/// How a page is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    Read,
    Write,
}

/// What the host has at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No mapping, or one that may not be read.
    NoAccess,
    /// A mapping with no page yet, or with one that is swapped out.
    Absent,
    /// A page that may be read. A write must copy it first, or is refused.
    Readable,
    /// A page that may be read and written.
    Writable,
}

/// Successive pages of which the host says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first page.
    pub(crate) start: Hva,
    /// How many pages of 4 KiB.
    pub(crate) pages: u64,
    /// What is there.
    pub(crate) state: State,
    /// The size of the host's mappings. A huge page of which the run holds but a part has its own size all the same.
    pub(crate) size: PageSize,
}

impl Run {
    fn new(range: Range<Hva>, state: State, size: PageSize) -> Self {
        let pages = range.end.checked_offset_from(range.start).unwrap_or(0) / PAGE_SIZE;
        Self { start: range.start, pages, state, size }
    }
}

/// The process's own memory, as its kernel describes it.
#[derive(Debug)]
pub(crate) struct Host {
    mappings: vma::Mappings,
    pages: pages::Pages,
}

impl Host {
    /// Opens the interfaces. They describe the memory of the process that opened them, even where a child inherits them.
    pub(crate) fn open() -> Result<Self, Errno> {
        Ok(Self { mappings: vma::Mappings::open()?, pages: pages::Pages::open()? })
    }

    /// Asks about `range` and replaces `runs` by the answer: at least one run from the start of `range` on, in order,
    /// without gaps, and no further than the end of `range` or of the mapping that covers its start.
    pub(crate) fn query(
        &self,
        range: Range<Hva>,
        exclusivity: Exclusivity,
        runs: &mut Vec<Run>,
    ) -> Result<(), Errno> {
        runs.clear();
        let covering = self.mappings.covering(range.start)?;
        let Some(vma) = covering.filter(|vma| vma.read) else {
            let end = covering.map_or(range.start.wrapping_add(PAGE_SIZE), |vma| vma.end.min(range.end));
            runs.push(Run::new(range.start..end, State::NoAccess, PageSize::Size4K));
            return Ok(());
        };
        self.pages.query(&vma, range.start..range.end.min(vma.end), exclusivity, runs)
    }

    /// What the host has at each page of `range`, and the size of its mapping; nothing where it can't be asked.
    pub(crate) fn pages_of(
        &self,
        range: &Range<Hva>,
    ) -> impl Iterator<Item = (Hva, (State, PageSize))> + use<> {
        let (mut all, mut runs) = (Vec::new(), Vec::new());
        let mut from = range.start;
        while from < range.end && self.query(from..range.end, Exclusivity::Ask, &mut runs).is_ok() {
            all.append(&mut runs);
            from = all.last().map_or(range.end, |run| run.start.wrapping_add(run.pages * PAGE_SIZE));
        }
        all.into_iter().flat_map(|run| {
            (0..run.pages).map(move |page| (run.start.wrapping_add(page * PAGE_SIZE), (run.state, run.size)))
        })
    }

    /// Whether the mapping at `hva` may be written at all.
    pub(crate) fn may_write(&self, hva: Hva) -> Result<bool, Errno> {
        Ok(self.mappings.covering(hva)?.is_some_and(|vma| vma.write))
    }

    /// Makes the pages of `range` present as a touch would.
    pub(crate) fn populate(&self, range: Range<Hva>, touch: Touch) -> Result<(), Failure> {
        populate::populate(range, touch)
    }
}

#[cfg(test)]
mod tests;
