//! What a run did, to the byte.
//!
//! Each stage accounts for every byte of the plan exactly once: mapped, skipped, failed or abandoned. What was not mapped
//! is listed with its range and its [`Reason`], in the plan's order, so that a caller can go on from there.

use std::path::{Path, PathBuf};

use premap_address::{Gpa, GpaRange};
use premap_address_space::limits::LimitKind;
use premap_kvm::Errno;
use serde::{Serialize, Serializer};

/// One of the two stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The page is present, and writable if asked, in this process: hva to hpa.
    Host,
    /// The guest-physical mapping is in the second-stage tables: gpa to hpa.
    Second,
}

/// What became of bytes that were not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// There was nothing to do, or no way to.
    Skipped,
    /// It was tried and can't be done.
    Failed,
    /// The run ended, or gave up, before it was done: trying again may well succeed.
    Abandoned,
}

/// Why bytes were not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// The caller asked for the other stage only.
    NotAsked,
    /// No memslot holds these addresses (ENOENT).
    NoMemslot,
    /// The VMM has taken them out of the guest's memory ([`SlotGuard::forget`](crate::SlotGuard::forget)).
    Forgotten,
    /// The host stage did not make them present.
    HostStageFailed,
    /// Pre-faulting is not to be had on this VM.
    Unsupported(Unsupported),
    /// The pages are a userfaultfd handler's to give: populating them would wait for it, for ever where nobody answers.
    Userfault,
    /// A device's registers or memory.
    Device,
    /// A hole in a file. Writing there would allocate it, as reading does on tmpfs, and else fill the page cache with zeroes.
    FileHole,
    /// A shared file that is not known to live in memory, and can't be looked at for where it has data.
    UnknownFile,
    /// KVM logs which of these pages become dirty, and pre-faulting would say that all are.
    DirtyLogged,
    /// Nothing is mapped there in this process.
    NotMapped,
    /// Mapped without the access that was asked for.
    NoAccess,
    /// The file behind ends before.
    BeyondFile,
    /// The file system of the file behind has no space left.
    NoSpace,
    /// There is no free huge page, or a cgroup's limit on them is reached.
    NoHugePage,
    /// The kernel refused them. At the host stage ENOMEM is memory that is not mapped, EINVAL a mapping whose protection
    /// does not allow the touch (or a device's), EFAULT one whose file has no such page, EHWPOISON a broken page.
    Errno(#[serde(serialize_with = "errno_name")] Errno),
    /// The byte budget was used up.
    Budget,
    /// They did not fit into what memory there is to take ([`HostMemory`](crate::HostMemory)), for this limit, which
    /// [`Report::limit`] names. Where memory is freed, another run finds room.
    HostMemory(#[serde(serialize_with = "limit_name")] LimitKind),
    /// The deadline had passed.
    Deadline,
    /// [`Stop`](crate::Stop) was used.
    Stopped,
    /// The kernel said EAGAIN until patience ran out.
    Busy,
    /// A call made no progress for the watchdog's time and was interrupted. On Linux before 6.15 a vCPU whose page-table
    /// root went stale does that until it runs.
    NoProgress,
    /// The VM is dead, or belongs to another process (EIO).
    VmDead,
}

impl Reason {
    /// What the reason makes of the bytes.
    #[must_use]
    pub const fn fate(self) -> Fate {
        match self {
            Self::NotAsked
            | Self::NoMemslot
            | Self::Forgotten
            | Self::HostStageFailed
            | Self::Unsupported(_)
            | Self::Userfault
            | Self::Device
            | Self::FileHole
            | Self::UnknownFile
            | Self::DirtyLogged => Fate::Skipped,
            Self::NotMapped
            | Self::NoAccess
            | Self::BeyondFile
            | Self::NoSpace
            | Self::NoHugePage
            | Self::Errno(_) => Fate::Failed,
            Self::Budget
            | Self::HostMemory(_)
            | Self::Deadline
            | Self::Stopped
            | Self::Busy
            | Self::NoProgress
            | Self::VmDead => Fate::Abandoned,
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotAsked => f.write_str("this stage was not asked for"),
            Self::NoMemslot => f.write_str("no memslot there"),
            Self::Forgotten => f.write_str("the VMM has taken it out of the guest's memory"),
            Self::HostStageFailed => f.write_str("not present on the host"),
            Self::Unsupported(why) => why.fmt(f),
            Self::Userfault => f.write_str("a userfaultfd handler gives these pages"),
            Self::Device => f.write_str("a device's memory"),
            Self::FileHole => f.write_str("a hole in the file behind it, which would be allocated"),
            Self::UnknownFile => f.write_str("a shared file that is not in memory and can't be looked at"),
            Self::DirtyLogged => {
                f.write_str("KVM logs dirty pages there, and pre-faulting would mark them all")
            }
            Self::NotMapped => f.write_str("nothing is mapped there in this process"),
            Self::NoAccess => f.write_str("mapped without access, or read-only"),
            Self::BeyondFile => f.write_str("beyond the end of the file behind it"),
            Self::NoSpace => f.write_str("no space left in the file system behind it"),
            Self::NoHugePage => f.write_str("no free huge page, or a cgroup's limit on them is reached"),
            Self::Errno(errno) => errno.fmt(f),
            Self::Budget => f.write_str("the byte budget was used up"),
            Self::HostMemory(limit) => write!(f, "it does not fit into {limit}"),
            Self::Deadline => f.write_str("the deadline passed"),
            Self::Stopped => f.write_str("the run was stopped"),
            Self::Busy => f.write_str("KVM stayed busy (EAGAIN)"),
            Self::NoProgress => f.write_str("the call made no progress and was interrupted"),
            Self::VmDead => f.write_str("the VM is dead or belongs to another process (EIO)"),
        }
    }
}

/// Which condition keeps a VM from pre-faulting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Unsupported {
    /// KVM shadows the guest's page tables: EPT or NPT is off or absent.
    ShadowPaging,
    /// The kernel is older than 6.11, or calls another thing by the capability's number.
    NotInKernel,
    /// The capability is there, the vCPU is not in a state for it: it runs a nested guest whose hypervisor uses EPT or NPT,
    /// or the VM is a confidential one whose launch is not finished.
    VcpuState,
    /// EOPNOTSUPP, and the engine was not given the VM to find out why.
    Unknown,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ShadowPaging => {
                "KVM shadows the guest's page tables here (no EPT or NPT in use), which has no pre-fault"
            }
            Self::NotInKernel => "this kernel has no KVM_PRE_FAULT_MEMORY; Linux 6.11 or later has it",
            Self::VcpuState => {
                "the vCPU runs a nested guest under EPT or NPT of its own, or a confidential VM is not launched yet"
            }
            Self::Unknown => "KVM refuses to pre-fault on this vCPU (EOPNOTSUPP)",
        })
    }
}

/// Bytes that were not mapped, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Unmapped {
    /// The stage that did not map them.
    pub stage: Stage,
    /// Which they are.
    pub range: GpaRange,
    /// Why.
    pub reason: Reason,
}

impl Unmapped {
    /// Takes `next` in where it goes on just where this one ends, in the same stage and for the same reason.
    pub(crate) fn absorb(&mut self, next: &Self) -> bool {
        let joined =
            self.range.join(next.range).filter(|_| (self.stage, self.reason) == (next.stage, next.reason));
        self.range = joined.unwrap_or(self.range);
        joined.is_some()
    }
}

/// What one stage did. The four sums add up to the plan's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StageReport {
    /// Bytes made present, or found so.
    pub mapped: u64,
    /// Bytes with nothing to do or no way to do it.
    pub skipped: u64,
    /// Bytes that the kernel refused.
    pub failed: u64,
    /// Bytes that the run did not get to, or gave up on.
    pub abandoned: u64,
    /// System calls made.
    pub calls: u64,
    /// The stage's share of the run's wall-clock time: where calls of both stages were under way at once, the moment is
    /// shared among them. The shares of both stages add up to the time in which anything was under way.
    pub ns: u64,
    /// Time in the stage's calls, summed over its threads.
    pub busy_ns: u64,
    /// Why the whole stage was not to be had, if it was not.
    pub unsupported: Option<Unsupported>,
}

impl StageReport {
    /// The plan's bytes, all accounted for.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.mapped + self.skipped + self.failed + self.abandoned
    }

    pub(crate) fn lose(&mut self, bytes: u64, reason: Reason) {
        match reason.fate() {
            Fate::Skipped => self.skipped += bytes,
            Fate::Failed => self.failed += bytes,
            Fate::Abandoned => self.abandoned += bytes,
        }
        if let Reason::Unsupported(why) = reason {
            self.unsupported = Some(why);
        }
    }
}

/// How many pages of each size KVM maps for the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageCounts {
    /// Mappings of 4 KiB.
    pub pages_4k: u64,
    /// Mappings of 2 MiB.
    pub pages_2m: u64,
    /// Mappings of 1 GiB.
    pub pages_1g: u64,
}

impl PageCounts {
    /// Reads the counts from a VM's statistics; a statistic that is missing counts as 0.
    #[must_use]
    pub fn from_stats(stats: &premap_kvm::Stats) -> Self {
        let count = |name| stats.get(name).unwrap_or(0);
        Self { pages_4k: count("pages_4k"), pages_2m: count("pages_2m"), pages_1g: count("pages_1g") }
    }
}

/// What a run did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The plan's bytes.
    pub asked: u64,
    /// The host stage.
    pub host: StageReport,
    /// The second stage.
    pub second: StageReport,
    /// All that the caller waited for; of a run in the background, from its beginning to its end.
    pub wall_ns: u64,
    /// What was not mapped, in the plan's order; neighbours with one reason are one entry.
    pub unmapped: Vec<Unmapped>,
    /// The files whose pages could not be had.
    pub files: Vec<BlamedFile>,
    /// The limit for which memory was left out or the run ended ([`Reason::HostMemory`]): its name, and its size.
    pub limit: Option<String>,
    /// KVM's mappings by size after the run, where the engine was given the VM.
    pub pages: Option<PageCounts>,
}

/// A file whose pages could not be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlamedFile {
    /// The first guest address that failed because of it.
    pub gpa: Gpa,
    /// Its path, as the kernel tells it.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
}

impl Report {
    /// Says why a range was not mapped, with the name of the file that is to blame, if one is.
    #[must_use]
    pub fn explain(&self, lost: &Unmapped) -> String {
        let file =
            self.files.iter().find(|file| lost.range.contains(file.gpa)).map(|file| file.path.display());
        match (lost.reason, file) {
            (Reason::NoSpace, Some(file)) => format!("no space left in {file}'s file system"),
            (reason, Some(file)) => format!("{reason} ({file})"),
            (reason, None) => reason.to_string(),
        }
    }

    /// Whether every byte was mapped at both stages.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.host.mapped == self.asked && self.second.mapped == self.asked
    }

    /// The ranges that a stage left and that are worth another run, in the plan's order.
    pub fn abandoned(&self, stage: Stage) -> impl Iterator<Item = GpaRange> + '_ {
        self.unmapped
            .iter()
            .filter(move |lost| lost.stage == stage && lost.reason.fate() == Fate::Abandoned)
            .map(|lost| lost.range)
    }
}

fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

fn limit_name<S: Serializer>(limit: &LimitKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(limit.name())
}

fn errno_name<S: Serializer>(errno: &Errno, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i32(errno.raw_os_error())
}
