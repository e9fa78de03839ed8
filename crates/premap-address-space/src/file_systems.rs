//! Which mapped files live in memory: those of tmpfs and its kin, by the file systems' device numbers.
//!
//! `/proc/self/mountinfo` has the number and the type of every file system that is mounted where this process can see it.
//! The kernel's own tmpfs, which memfds and shared anonymous memory lie in, is mounted nowhere; its files are known by the
//! names that the kernel gives them. What is neither may be on a disk, and is taken for that: so a tmpfs outside of a
//! chroot is, too.

use std::os::unix::ffi::OsStrExt;

use crate::smaps::MappedFile;

/// File systems whose files are memory and nothing else.
const IN_MEMORY: [&[u8]; 4] = [b"tmpfs", b"ramfs", b"hugetlbfs", b"devtmpfs"];
/// How the kernel names the files of its own tmpfs: memfds, shared anonymous memory, System V segments.
const OWN: [&[u8]; 3] = [b"/memfd:", b"/dev/zero", b"/SYSV"];

/// The device numbers of file systems in memory.
#[derive(Debug, Default)]
pub(crate) struct FileSystems(Vec<(u32, u32)>);

impl FileSystems {
    /// Reads which are mounted. Where that can't be read, none is.
    pub(crate) fn read() -> Self {
        Self::parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(mountinfo: &[u8]) -> Self {
        Self(mountinfo.split(|byte| *byte == b'\n').filter_map(in_memory).collect())
    }

    /// Whether a file is memory and nothing else.
    pub(crate) fn hold_in_memory(&self, file: &MappedFile) -> bool {
        is_the_kernels_own(file) || self.0.contains(&file.device)
    }
}

/// Whether a file is in the kernel's own tmpfs, where it has no name and whoever has it may write it.
pub(crate) fn is_the_kernels_own(file: &MappedFile) -> bool {
    let path = file.path.as_os_str().as_bytes();
    // A file system without a device of its own has major number 0.
    file.device.0 == 0 && OWN.iter().any(|name| path.starts_with(name))
}

/// `id parent major:minor root mount-point options optional... - type source options`
fn in_memory(line: &[u8]) -> Option<(u32, u32)> {
    let mut words = line.split(|byte| *byte == b' ');
    let (major, minor) = std::str::from_utf8(words.nth(2)?).ok()?.split_once(':')?;
    words.find(|word| *word == b"-")?;
    let kind = words.next()?;
    IN_MEMORY.contains(&kind).then_some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, device: (u32, u32), expected: bool) {
        let mountinfo = b"22 28 0:21 / /proc rw,nosuid - proc proc rw\n\
            29 28 0:26 / /dev/shm rw,nosuid shared:4 - tmpfs tmpfs rw,size=8k\n\
            28 1 254:1 / / rw,relatime shared:1 master:2 - ext4 /dev/vda1 rw\n\
            99 28 0:77 / /mnt/\xff rw - 9p - rw\n\
            torn";
        let file = MappedFile { path: path.into(), device, inode: 7, offset: 0, in_memory: false };
        assert_eq!(FileSystems::parse(mountinfo).hold_in_memory(&file), expected, "{path}");
    }

    #[test]
    fn files_of_tmpfs_and_the_kernels_own_are_memory_and_others_are_not() {
        check("/dev/shm/ram", (0, 26), true);
        check("/memfd:ram", (0, 1), true);
        check("/dev/zero", (0, 1), true);
        check("/disk.img", (254, 1), false);
        check("/memfd:on-a-disk", (254, 1), false);
        check("/mnt/x", (0, 77), false);
        check("/somewhere/else", (0, 99), false);
    }
}
