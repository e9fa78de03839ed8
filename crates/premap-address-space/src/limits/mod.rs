//! How much memory this process may still take: what the host has left, and every limit above the process.
//!
//! Memory beyond a limit is not refused when it is touched: the kernel kills. Who is about to take much of it at once asks
//! here first. What can't be read counts as no limit, so that nothing is refused where `/proc` or `/sys` are missing.
//!
//! | limit | read from |
//! |---|---|
//! | what the host has | `MemAvailable` of `/proc/meminfo` |
//! | what the NUMA nodes of its cpuset have, where those are not all | `Mems_allowed_list` of `/proc/self/status`, `meminfo` of `/sys/devices/system/node` |
//! | memory cgroups, the process's own and each above it | `memory.max` and `memory.high`, or `memory.limit_in_bytes` and `memory.memsw.limit_in_bytes` of version 1, less what is used and can't be reclaimed |
//! | pages set apart for hugetlb | `/sys/kernel/mm/hugepages` |
//! | hugetlb cgroups | `hugetlb.2MB.max` and the like, `hugetlb.2MB.rsvd.max` for new mappings |
//! | address space | `RLIMIT_AS`, for new mappings: what is mapped already counts already |

mod cgroup;
mod file;
mod host;
mod hugetlb;
mod memory;
mod numa;

use std::fmt;
use std::path::{Path, PathBuf};

use cgroup::Groups;
use file::Files;

/// What kind of limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// The memory that the host has available.
    Available,
    /// A memory cgroup's.
    Cgroup,
    /// The pages that are set apart for hugetlb.
    HugetlbPool,
    /// A hugetlb cgroup's.
    HugetlbCgroup,
    /// RLIMIT_AS.
    AddressSpace,
}

impl LimitKind {
    /// A word for it, for machines to read.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Cgroup => "cgroup",
            Self::HugetlbPool => "hugetlb_pool",
            Self::HugetlbCgroup => "hugetlb_cgroup",
            Self::AddressSpace => "address_space",
        }
    }
}

impl fmt::Display for LimitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Available => "the memory that the host has available",
            Self::Cgroup => "a memory cgroup's limit",
            Self::HugetlbPool => "the host's pool of hugetlb pages",
            Self::HugetlbCgroup => "a hugetlb cgroup's limit",
            Self::AddressSpace => "the limit on this process's address space",
        })
    }
}

/// A limit, and how far it is from being reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Its kind.
    pub kind: LimitKind,
    /// The file in the cgroup's directory that states it, or the pool's directory, or that of the NUMA nodes.
    pub path: Option<PathBuf>,
    /// How many bytes it allows in all.
    pub bytes: u64,
    /// How many of them can still be taken: free ones, and those that the kernel can take back.
    pub left: u64,
}

/// The margin for what is not foreseen: a sixteenth, but no less than this,
const MARGIN_LEAST: u64 = 32 << 20;
/// and no more than this.
const MARGIN_MOST: u64 = 1 << 30;

impl Limit {
    /// How many bytes are better left: for the VMM's own growth and the kernel's share of it (page tables, buffers), which
    /// come on top of what is planned. hugetlb pages are used for nothing else, and need none.
    #[must_use]
    pub fn margin(&self) -> u64 {
        match self.kind {
            LimitKind::HugetlbPool | LimitKind::HugetlbCgroup => 0,
            LimitKind::Available | LimitKind::Cgroup | LimitKind::AddressSpace => {
                (self.bytes / 16).clamp(MARGIN_LEAST, MARGIN_MOST)
            }
        }
    }

    /// How many bytes can be taken with the margin left over.
    #[must_use]
    pub fn spare(&self) -> u64 {
        self.left.saturating_sub(self.margin())
    }
}

/// With its file and size: `the memory limit of cgroup /sys/fs/cgroup/vm (memory.max, 200 MiB)`.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, left, mib) = (self.kind, self.left >> 20, self.bytes >> 20);
        let group = self
            .path
            .as_deref()
            .and_then(|path| Some((path.parent()?.display(), path.file_name()?.display())));
        match (kind, group) {
            (LimitKind::Available, None) => write!(f, "{kind} ({left} of {mib} MiB)"),
            (LimitKind::Available, Some(_)) => {
                write!(f, "{kind} on the NUMA nodes of this process's cpuset ({left} of {mib} MiB)")
            }
            (LimitKind::HugetlbPool, _) => write!(f, "{kind} ({left} of {mib} MiB free)"),
            (LimitKind::AddressSpace, _) => write!(f, "{kind} (RLIMIT_AS, {mib} MiB)"),
            (LimitKind::Cgroup, Some((group, file))) => {
                write!(f, "the memory limit of cgroup {group} ({file}, {mib} MiB)")
            }
            (LimitKind::HugetlbCgroup, Some((group, file))) => {
                write!(f, "the hugetlb limit of cgroup {group} ({file}, {mib} MiB)")
            }
            (LimitKind::Cgroup | LimitKind::HugetlbCgroup, None) => write!(f, "{kind} ({mib} MiB)"),
        }
    }
}

/// Which pages are to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// The host's ordinary ones, huge or not.
    Ordinary,
    /// hugetlb pages of so many bytes.
    Hugetlb(u64),
}

/// Whether they are mapped already, and only not present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// They are, so that their addresses, and a reservation of hugetlb pages, are counted already.
    Made,
    /// A new mapping is to be made for them.
    Planned,
}

/// The limits above this process. Where they are was found once; how far they are is read each time.
#[derive(Debug)]
pub struct Limits {
    files: Files,
    memory: Groups,
    hugetlb: Groups,
}

impl Limits {
    /// Finds the limits above this process.
    #[must_use]
    pub fn find() -> Self {
        Self::find_below(Path::new("/"))
    }

    /// The same with another root directory.
    fn find_below(root: &Path) -> Self {
        let files = Files::below(root);
        let text = |path| files.read(Path::new(path)).unwrap_or_default();
        let (of_process, mounts) = (text("/proc/self/cgroup"), text("/proc/self/mountinfo"));
        let groups = |controller| Groups::find(controller, &of_process, &mounts);
        Self { memory: groups("memory"), hugetlb: groups("hugetlb"), files }
    }

    /// Reads every limit on such pages.
    #[must_use]
    pub fn read(&self, pages: Pages, mapping: Mapping) -> Vec<Limit> {
        let mut limits = Vec::new();
        match pages {
            Pages::Ordinary => {
                limits.extend(host::available(&self.files));
                limits.extend(numa::available(&self.files));
                limits.extend(memory::limits(&self.files, &self.memory));
            }
            Pages::Hugetlb(bytes) => {
                limits.extend(hugetlb::pool(&self.files, bytes, mapping));
                limits.extend(hugetlb::limits(&self.files, &self.hugetlb, bytes, mapping));
                if self.memory.count_hugetlb() {
                    limits.extend(memory::limits(&self.files, &self.memory));
                }
            }
        }
        if mapping == Mapping::Planned {
            limits.extend(host::address_space(&self.files));
        }
        limits
    }

    /// The limit that leaves the least, if there is any.
    #[must_use]
    pub fn tightest(&self, pages: Pages, mapping: Mapping) -> Option<Limit> {
        self.read(pages, mapping).into_iter().min_by_key(Limit::spare)
    }
}

#[cfg(test)]
mod tests;
