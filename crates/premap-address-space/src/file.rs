//! What of a mapped file has data, and what its file system has room for.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use rustix::fs::{OFlags, SeekFrom, fstatvfs, major, minor, seek};
use rustix::io::Errno;

use crate::smaps::{Area, MappedFile};

/// Holes shorter than this are told as data: an image in shreds is not worth a range for each.
const SHORTEST_HOLE: u64 = 1 << 20;

impl Area {
    /// The parts of `range`, which lies in the area, behind which its file has data, in ascending order.
    ///
    /// # Errors
    /// As [`MappedFile::data`]; `NotFound` where there is no file.
    pub fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let first = file.offset + (range.start - self.start);
        let data = file.data(first..first.saturating_add(range.end - range.start))?;
        let here = |data: Range<u64>| data.start - first + range.start..data.end - first + range.start;
        Ok(data.into_iter().map(here).collect())
    }
}

impl MappedFile {
    /// The parts of a range of the file that have data, in ascending order; the rest are holes, for which the file system
    /// has set no room apart.
    ///
    /// # Errors
    /// What opening the file by its path gives, `NotFound` where another file lies there by now, or `WouldBlock` where this
    /// process may have locks on it, which closing it would give up.
    pub fn data(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let file = self.open_to_seek()?;
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let start = match seek(&file, SeekFrom::Data(at)) {
                Ok(start) if start < range.end => start,
                // Nothing but a hole follows.
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            let end = seek(&file, SeekFrom::Hole(start))?.min(range.end);
            match found.last_mut().filter(|last| start - last.end < SHORTEST_HOLE) {
                Some(last) => last.end = end,
                None => found.push(start..end),
            }
            at = end.max(at + 1);
        }
        Ok(found)
    }

    /// How many bytes the file has.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn bytes(&self) -> io::Result<u64> {
        Ok(self.open()?.metadata()?.len())
    }

    /// How many bytes more its file system has room for. A tmpfs without a size has room for all that there is.
    ///
    /// # Errors
    /// As [`data`](Self::data), where its directory is gone too.
    pub fn room(&self) -> io::Result<u64> {
        // VMMs delete their memory's file once it is open.
        let told = fstatvfs(self.open().or_else(|_| self.directory())?)?;
        let has_size = told.f_blocks > 0;
        Ok(if has_size { told.f_bavail.saturating_mul(told.f_frsize) } else { u64::MAX })
    }

    /// The directory that it was in, if that is of the same file system.
    fn directory(&self) -> io::Result<File> {
        let gone = io::ErrorKind::NotFound;
        let directory = File::open(self.path.parent().ok_or(gone)?)?;
        let device = directory.metadata()?.dev();
        if (major(device), minor(device)) == self.device { Ok(directory) } else { Err(gone.into()) }
    }

    /// Opens the file in a way that can be sought in, if that does no harm.
    fn open_to_seek(&self) -> io::Result<File> {
        self.open()?;
        if own_locks(self.inode) {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            self.open_as(OFlags::NONBLOCK)
        }
    }

    /// Opens the file to ask about it. A device does nothing for that, and no lock is given up when it is closed.
    fn open(&self) -> io::Result<File> {
        self.open_as(OFlags::PATH)
    }

    fn open_as(&self, flags: OFlags) -> io::Result<File> {
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.path)?;
        let data = file.metadata()?;
        // The device is not compared: some file systems tell another one to stat than to the address space.
        if data.ino() == self.inode && data.is_file() {
            Ok(file)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

/// Whether this process has a POSIX lock on a file with this number, or that can't be told: such locks are gone as soon as
/// the process closes the file by whatever descriptor.
fn own_locks(inode: u64) -> bool {
    std::fs::read_to_string("/proc/locks").map_or(true, |locks| has_lock(&locks, std::process::id(), inode))
}

/// `1: POSIX ADVISORY WRITE pid major:minor:inode start end`, with an arrow before the kind where it is waited for.
fn has_lock(locks: &str, process: u32, inode: u64) -> bool {
    locks.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip_while(|word| *word != "POSIX").skip(3);
        let owner = words.next().and_then(|word| word.parse().ok());
        let file = words.next().and_then(|word| word.rsplit(':').next()?.parse().ok());
        (owner, file) == (Some(process), Some(inode))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A file of 16 MiB in the folder for temporary files, as if mapped.
    fn sparse(name: &str) -> (File, MappedFile) {
        let path = std::env::temp_dir().join(format!("premap-{}-{name}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(16 * MIB).unwrap();
        let inode = file.metadata().unwrap().ino();
        (file, MappedFile { path, device: (0, 0), inode, offset: 0, in_memory: false })
    }

    #[test]
    fn data_is_told_from_holes() {
        let (file, mapped) = sparse("holes");
        assert_eq!(mapped.data(0..16 * MIB).unwrap(), []);
        for at in [0, 8 * MIB, 8 * MIB + MIB / 2] {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        let found = mapped.data(0..16 * MIB).unwrap();
        // A file system that knows no holes tells one range of all.
        if found.len() > 1 {
            // The two that lie near each other are one.
            assert_eq!(found.len(), 2, "{found:?}");
            assert!(found[0].contains(&0) && found[0].end < 8 * MIB, "{found:?}");
            assert!(found[1].start >= 7 * MIB && found[1].contains(&(8 * MIB + MIB / 2)), "{found:?}");
        }
        assert_eq!(mapped.data(MIB..8 * MIB).unwrap().is_empty(), found.len() > 1);
        assert!(mapped.bytes().unwrap() == 16 * MIB && mapped.room().unwrap() > 0);
        std::fs::remove_file(&mapped.path).unwrap();
    }

    #[test]
    fn a_look_gives_up_no_lock_of_the_process() {
        let (file, mapped) = sparse("locked");
        // On a descriptor of the process and not of the open file: a POSIX lock.
        rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert_eq!(mapped.data(0..MIB).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(mapped.bytes().is_ok() && mapped.room().is_ok());
        assert!(own_locks(mapped.inode), "the lock is there still");
        drop(file);
        assert!(mapped.data(0..MIB).is_ok());
        std::fs::remove_file(&mapped.path).unwrap();

        let locks = "1: POSIX  ADVISORY  WRITE 77 fe:01:123 0 EOF\n2: -> POSIX  ADVISORY  READ 78 fe:01:9 0 0\n\
            3: OFDLCK ADVISORY  WRITE -1 fe:01:9 0 EOF\n4: FLOCK  ADVISORY  WRITE 77 fe:01:9 0 EOF\ntorn POSIX";
        assert!(has_lock(locks, 77, 123) && has_lock(locks, 78, 9));
        assert!(!has_lock(locks, 77, 9) && !has_lock(locks, 79, 123));
    }

    #[test]
    fn another_file_at_its_place_is_not_looked_at() {
        let (_file, mapped) = sparse("replaced");
        std::fs::remove_file(&mapped.path).unwrap();
        std::fs::create_dir(&mapped.path).unwrap();
        assert!(mapped.data(0..MIB).is_err());
        std::fs::remove_dir(&mapped.path).unwrap();
    }
}
