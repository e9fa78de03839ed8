//! What guest memory is made of.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use premap_address::PageSize;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::MemoryError;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory in 4 KiB pages.
    Anonymous,
    /// Private anonymous memory in transparent huge pages, where the host grants them.
    TransparentHuge,
    /// A shared memfd.
    Memfd,
    /// Private hugetlb pages of 2 MiB.
    Hugetlb,
    /// A private mapping of a file that has content, as a snapshot's memory has.
    File,
}

impl Backing {
    /// Every backing.
    pub const ALL: [Self; 5] =
        [Self::Anonymous, Self::TransparentHuge, Self::Memfd, Self::Hugetlb, Self::File];

    /// The name that users write.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anon",
            Self::TransparentHuge => "thp",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
            Self::File => "file",
        }
    }

    /// The unit in which such memory can be had.
    #[must_use]
    pub const fn page_size(self) -> PageSize {
        match self {
            Self::Hugetlb => PageSize::Size2M,
            _ => PageSize::Size4K,
        }
    }

    /// Whether the host has pages set apart for so much memory; only hugetlb needs them.
    pub(crate) fn check_room(self, bytes: u64) -> Result<(), MemoryError> {
        if self != Self::Hugetlb {
            return Ok(());
        }
        let needed = bytes / PageSize::Size2M.bytes();
        let free = pool("free_hugepages").saturating_sub(pool("resv_hugepages"));
        if free >= needed {
            return Ok(());
        }
        Err(MemoryError::HugetlbPool { free, needed, remedy: pool("nr_hugepages") + needed - free })
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backing {
    type Err = UnknownBacking;

    fn from_str(name: &str) -> Result<Self, UnknownBacking> {
        Self::ALL
            .into_iter()
            .find(|backing| backing.name() == name)
            .ok_or_else(|| UnknownBacking(name.into()))
    }
}

/// A name that no [`Backing`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no backing is called {0:?}; there are anon, thp, memfd, hugetlb and file")]
pub struct UnknownBacking(String);

/// A value of the pool of 2 MiB hugetlb pages; a kernel without such pages has none.
fn pool(value: &str) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{value}");
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A nameless file of `bytes` that has content and is in the page cache.
pub(crate) fn private_file(bytes: u64) -> Result<OwnedFd, MemoryError> {
    private_file_in(std::env::temp_dir(), bytes)
}

fn private_file_in(folder: PathBuf, bytes: u64) -> Result<OwnedFd, MemoryError> {
    match filled_file(&folder, bytes) {
        Ok(file) => Ok(file.into()),
        Err(errno) => Err(MemoryError::TemporaryFile { folder, bytes, errno }),
    }
}

fn filled_file(folder: &Path, bytes: u64) -> Result<File, Errno> {
    let mut file = File::from(temporary_file(folder)?);
    let block = [0x5a; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let part = block.len().min(usize::try_from(left).unwrap_or(block.len()));
        let written = file.write_all(&block[..part]);
        written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        left -= part as u64;
    }
    Ok(file)
}

fn temporary_file(folder: &Path) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags | OFlags::TMPFILE, mode) {
        // Some filesystems, initramfs among them, have no nameless files: a name that is gone at once will do.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
            let path = folder.join(format!("premap-guest-{}", std::process::id()));
            let fd = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
            rustix::fs::unlink(&path)?;
            Ok(fd)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_what_they_name() {
        for backing in Backing::ALL {
            assert_eq!(backing.name().parse(), Ok(backing));
        }
        let unknown = "nvme".parse::<Backing>().unwrap_err().to_string();
        assert!(unknown.contains("nvme") && unknown.contains("hugetlb"), "{unknown}");
    }

    #[test]
    fn a_temporary_file_that_can_t_be_had_names_folder_and_remedy() {
        for (folder, errno) in [("/nowhere", "os error 2"), ("/dev/full", "os error 20")] {
            let error = private_file_in(folder.into(), 4096).unwrap_err().to_string();
            for part in [folder, errno, "4096 bytes", "TMPDIR"] {
                assert!(error.contains(part), "{part:?} is not in {error:?}");
            }
        }
    }

    #[test]
    fn a_hugetlb_pool_too_small_names_pages_and_remedy() {
        let error = Backing::Hugetlb.check_room(1 << 60).unwrap_err().to_string();
        assert!(error.contains("549755813888") && error.contains("vm.nr_hugepages="), "{error}");
    }
}
