//! What a VMM says of its guest's memory: where it lies, and what is behind it.

use premap_address::{GpaRange, Hva, PAGE_SIZE, PageSize};
use serde::Serialize;

/// A stretch of guest memory: `range` in the guest, as many bytes from `host` on in this process.
///
/// Every VMM has these four at hand, whatever library holds its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub range: GpaRange,
    /// Where this process sees it; 4 KiB-aligned.
    pub host: Hva,
    /// What is behind it.
    pub backing: Backing,
    /// How its pages are made present on the host's side.
    pub touch: Touch,
}

impl Region {
    /// Private memory, which lies nowhere in this process.
    #[must_use]
    pub const fn private(range: GpaRange) -> Self {
        Self { range, host: Hva::new(0), backing: Backing::GuestMemfd, touch: Touch::Write }
    }
}

/// What is behind guest memory on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Backing {
    /// Private anonymous memory, with or without transparent huge pages.
    Anonymous,
    /// A shared mapping of a memfd, of shmem or of a file.
    Shared,
    /// hugetlbfs pages of this size, private or shared.
    Hugetlb(PageSize),
    /// A private mapping of a file: reading shares the page cache, writing copies the page.
    PrivateFile,
    /// Memory that only the guest can see: a guest_memfd's. KVM makes it present when it maps it, so that the host stage
    /// has nothing to do.
    GuestMemfd,
}

impl Backing {
    /// The smallest unit in which the host can make it present, in bytes.
    pub(crate) const fn unit(self) -> u64 {
        match self {
            Self::Hugetlb(size) => size.bytes(),
            Self::Anonymous | Self::Shared | Self::PrivateFile | Self::GuestMemfd => PAGE_SIZE,
        }
    }
}

/// How pages are made present on the host's side. Neither changes what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Touch {
    /// As a read would. For read-only slots, and for private file mappings that should go on sharing the page cache. On
    /// fresh private memory it maps the zero page, and the guest's first write then costs two faults.
    Read,
    /// As a write would: pages are allocated, and copy-on-write is broken now.
    #[default]
    Write,
}
