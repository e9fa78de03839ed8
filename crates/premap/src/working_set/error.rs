//! Why there is no working set, or none for this VM.

use premap_address::{Gpa, GpaRange, PageSize, RangeError};
use premap_address_space::Unopened;
use premap_kvm::Errno;

use super::Identity;

/// Why a guest's memory can't be watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A file that tells of this process's memory can't be opened.
    #[error("{path}: {errno}; {}", remedy(*.errno))]
    Open {
        /// Which.
        path: &'static str,
        /// Why.
        errno: Errno,
    },
    /// The kernel does not answer.
    #[error("the kernel does not tell which pages are present: {0}")]
    Look(Errno),
    /// There can be no thread to look from while the guest runs. [`Recorder::look`](super::Recorder::look) needs none.
    #[error(
        "no thread can be started to look from: {0}; raise the limit of threads: `ulimit -u`, or pids.max of the cgroup"
    )]
    Spawn(#[source] std::io::Error),
}

/// What to do about a file of `/proc/self`.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT | Errno::NOTDIR => "mount proc on /proc, where the VMM is in a chroot inside that",
        Errno::MFILE | Errno::NFILE => "allow more open files",
        _ => "allow this process to read it, in its seccomp filter too",
    }
}

impl From<Unopened> for RecordError {
    fn from(Unopened { path, errno }: Unopened) -> Self {
        Self::Open { path, errno }
    }
}

/// Why ranges make no working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// A range does not consist of whole pages.
    #[error("range {range} starts or ends inside a page of {page}")]
    CutsPage {
        /// Which.
        range: GpaRange,
        /// The working set's pages.
        page: PageSize,
    },
    /// A page is in two ranges.
    #[error("ranges {first} and {second} overlap")]
    Overlap {
        /// One of them.
        first: GpaRange,
        /// The other.
        second: GpaRange,
    },
}

/// Why bytes are no working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// It does not begin as one.
    #[error("not a working set; `premap record` writes one")]
    NotAWorkingSet,
    /// It is of another version of the format.
    #[error("a working set of version {0}, and this premap reads version 1; record it again")]
    Version(u32),
    /// It ends too early.
    #[error("a working set cut short: {bytes} bytes of {expected}; copy it again")]
    Truncated {
        /// The bytes that there are.
        bytes: u64,
        /// The bytes that its header speaks of, or that the shortest has.
        expected: u64,
    },
    /// Something comes after its end.
    #[error("a working set of {expected} bytes with {bytes}; copy it again")]
    TrailingBytes {
        /// The bytes that there are.
        bytes: u64,
        /// The bytes that its header speaks of.
        expected: u64,
    },
    /// It is damaged.
    #[error(
        "a damaged working set: its checksum is {found:#010x} and its content's {computed:#010x}; copy it again"
    )]
    Checksum {
        /// The checksum in the file.
        found: u32,
        /// The content's.
        computed: u32,
    },
    /// Its pages are of a size that there is not.
    #[error("a working set of pages of {0} bytes; 4 KiB, 2 MiB and 1 GiB are known")]
    PageSize(u32),
    /// An address has low bits set that mean nothing.
    #[error("a working set with an address that means nothing, {0}")]
    Address(Gpa),
    /// A range is empty, unaligned or wraps.
    #[error("a working set with a bad range: {0}")]
    Range(RangeError),
    /// The ranges don't go together.
    #[error("a working set whose {0}")]
    Content(WorkingSetError),
}

/// Why a working set does not fit a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// It was recorded of something else.
    #[error("recorded of another image, {recorded}, not of {image}; record it again")]
    OtherImage {
        /// Of what it was recorded.
        recorded: Identity,
        /// What the VM runs.
        image: Identity,
    },
    /// The VM has no memory there.
    #[error("range {0} is not in this VM's memory; it was recorded of another machine, record it again")]
    Outside(GpaRange),
    /// The VM's memory comes in larger pages there.
    #[error(
        "range {range} cuts a page of the VM's memory, {unit:#x} bytes; record it on memory of that kind"
    )]
    CutsPage {
        /// Which.
        range: GpaRange,
        /// The page size of the memory's backing.
        unit: u64,
    },
}
