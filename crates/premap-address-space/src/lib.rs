//! What Linux says of this process's own memory: what is mapped where, and which pages are there.
//!
//! Guest memory is memory of the VMM's, and KVM maps for the guest what the host's page tables hold. Who wants to know what
//! that is asks here. Six questions, each with one interface of the kernel, and a fallback where that may be missing:
//!
//! | question | asked of | where that is missing |
//! |---|---|---|
//! | what mapping covers this address, with what permissions | [`AddressSpace::may_write`] and the like: `PROCMAP_QUERY`, Linux 6.11 | the text of `/proc/self/smaps` |
//! | what is mapped anywhere, and of what kind | [`areas`]: `/proc/self/smaps` | never missing |
//! | which pages are present, zero, huge | [`AddressSpace::query`]: `PAGEMAP_SCAN`, Linux 6.7 | `/proc/self/pagemap`; huge pages are then taken for small ones |
//! | what of shared memory is there, mapped here or not | [`Area::resident`]: `mincore` | what is mapped here counts alone |
//! | how much more may be taken | [`limits`]: `/proc/meminfo`, cgroups, hugetlb pools, `RLIMIT_AS` | what can't be read is no limit |
//! | is a private page ours alone | [`AddressSpace::query`]: `/proc/self/pagemap`, bit 56 | never missing |
//!
//! An answer is true only for the moment it was given. Who acts on one must have a way to learn that it was overtaken.
//!
//! **A page is writable** when the processor could write it without a fault: in a writable mapping, present, and either of a
//! shared mapping or a private page that is ours alone. The zero page, the page cache under a private file mapping and
//! pages shared by fork or KSM are present but not writable: a write must copy them first.

mod file;
mod file_systems;
pub mod limits;
mod mappings;
mod pages;
mod present;
mod resident;
mod scan;
mod smaps;

use std::ops::Range;

use premap_address::{Hva, PAGE_SIZE, PageSize};
use rustix::io::Errno;

pub use mappings::PROCMAP_QUERY;
pub use pages::Exclusivity;
pub use present::{copied, present};
pub use resident::cached;
pub use scan::PAGEMAP_SCAN;
pub use smaps::{Area, Kind, MappedFile, areas};

/// What the host has at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
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
pub struct Run {
    /// The first page.
    pub start: Hva,
    /// How many pages of 4 KiB.
    pub pages: u64,
    /// What is there.
    pub state: State,
    /// The size of the host's mappings. A huge page of which the run holds but a part has its own size all the same.
    pub size: PageSize,
}

impl Run {
    fn new(range: Range<Hva>, state: State, size: PageSize) -> Self {
        let pages = range.end.checked_offset_from(range.start).unwrap_or(0) / PAGE_SIZE;
        Self { start: range.start, pages, state, size }
    }

    /// The address just past the last page.
    #[must_use]
    pub const fn end(&self) -> Hva {
        self.start.wrapping_add(self.pages * PAGE_SIZE)
    }
}

/// The process's own memory, as its kernel describes it.
#[derive(Debug)]
pub struct AddressSpace {
    mappings: mappings::Mappings,
    pages: pages::Pages,
}

impl AddressSpace {
    /// Opens the interfaces. They describe the memory of the process that opened them, even where a child inherits them.
    ///
    /// # Errors
    /// Which file of `/proc/self` can't be opened.
    pub fn open() -> Result<Self, Unopened> {
        Ok(Self { mappings: mappings::Mappings::open()?, pages: pages::Pages::open()? })
    }

    /// Asks about `range` and replaces `runs` by the answer: at least one run from the start of `range` on, in order,
    /// without gaps, and no further than the end of `range` or of the mapping that covers its start.
    ///
    /// # Errors
    /// The kernel's errno; a mapping that is not there is an answer and no error.
    pub fn query(
        &self,
        range: Range<Hva>,
        exclusivity: Exclusivity,
        runs: &mut Vec<Run>,
    ) -> Result<(), Errno> {
        runs.clear();
        let covering = self.mappings.covering(range.start)?;
        let Some(mapping) = covering.filter(|mapping| mapping.read) else {
            let end =
                covering.map_or(range.start.wrapping_add(PAGE_SIZE), |mapping| mapping.end.min(range.end));
            runs.push(Run::new(range.start..end, State::NoAccess, PageSize::Size4K));
            return Ok(());
        };
        self.pages.query(&mapping, range.start..range.end.min(mapping.end), exclusivity, runs)
    }

    /// Asks about the whole of `range`, over the ends of mappings.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn query_all(&self, range: Range<Hva>, exclusivity: Exclusivity) -> Result<Vec<Run>, Errno> {
        let (mut all, mut runs) = (Vec::new(), Vec::new());
        let mut from = range.start;
        while from < range.end {
            self.query(from..range.end, exclusivity, &mut runs)?;
            // An answer that tells nothing would be asked for again and again.
            let Some(last) = runs.last() else { break };
            from = last.end();
            all.append(&mut runs);
        }
        Ok(all)
    }

    /// What the host has at each page of `range`, and the size of its mapping; nothing where it can't be asked.
    pub fn pages_of(&self, range: &Range<Hva>) -> impl Iterator<Item = (Hva, (State, PageSize))> + use<> {
        let all = self.query_all(range.clone(), Exclusivity::Ask).unwrap_or_default();
        all.into_iter().flat_map(|run| {
            (0..run.pages).map(move |page| (run.start.wrapping_add(page * PAGE_SIZE), (run.state, run.size)))
        })
    }

    /// Whether [`query`](Self::query) asks by `PAGEMAP_SCAN`, as far as it is known by now.
    #[must_use]
    pub fn scans(&self) -> bool {
        self.pages.scans()
    }

    /// Whether the mapping at `hva` may be written at all.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn may_write(&self, hva: Hva) -> Result<bool, Errno> {
        Ok(self.mappings.covering(hva)?.is_some_and(|mapping| mapping.write))
    }
}

/// A file of `/proc/self` that can't be opened, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unopened {
    /// Its path.
    pub path: &'static str,
    /// The kernel's errno.
    pub errno: Errno,
}

impl From<Unopened> for Errno {
    fn from(unopened: Unopened) -> Self {
        unopened.errno
    }
}

fn open(path: &'static str) -> Result<std::fs::File, Unopened> {
    std::fs::File::open(path).map_err(|error| Unopened { path, errno: errno(&error) })
}

/// The errno of an operation on a file of `/proc/self`.
fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
