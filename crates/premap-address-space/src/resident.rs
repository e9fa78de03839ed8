//! Which pages of shared memory are there, whether or not this process's page tables hold them.
//!
//! Shared memory may have been filled before it was mapped here: a snapshot that was copied to `/dev/shm`, a memfd that
//! another process wrote. Its pages are absent to `/proc/self/pagemap` until they are touched, yet to map them takes no
//! memory. `mincore` looks where they are.
// UNSAFETY: one system call; its block argues that the kernel writes only where it is told to.
#![expect(unsafe_code, reason = "mincore")]

use std::ops::Range;

use premap_address::{PAGE_SHIFT, PAGE_SIZE};
use rustix::io::Errno;

use crate::file_systems::is_the_kernels_own;
use crate::present::present;
use crate::smaps::{Area, Kind};

/// How many pages one call tells of: 128 MiB.
const AT_ONCE: usize = 32 << 10;

impl Area {
    /// Gives the parts of `range`, which lies in the area, that are in memory, in ascending order: mapping them takes none.
    ///
    /// # Errors
    /// As [`present`].
    pub fn resident(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
        // To who may not write the file mincore says that all is there. The kernel's own files everybody may write who has
        // them; of others only what has data counts.
        let data = match &self.file {
            _ if self.kind != Kind::Shared => None,
            Some(file) if !is_the_kernels_own(file) => self.data(range.clone()).ok(),
            _ => Some(vec![range.clone()]),
        };
        match data.and_then(|data| Some(both(&data, &cached(range.clone()).ok()?))) {
            Some(resident) => Ok(resident),
            None => present(range),
        }
    }
}

/// The parts that are in both lists, each in ascending order.
fn both(one: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut found = Vec::new();
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        let part = a.start.max(b.start)..a.end.min(b.end);
        if a.end < b.end {
            one.next()
        } else {
            other.next()
        };
        if !part.is_empty() {
            found.push(part);
        }
    }
    found
}

/// Gives the parts of a range without gaps that are in memory, whether mapped here or not, in ascending order.
///
/// # Errors
/// The kernel's errno.
pub fn cached(range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    if !range.start.is_multiple_of(PAGE_SIZE) || !range.end.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::INVAL);
    }
    let mut pages = [0_u8; AT_ONCE];
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + AT_ONCE as u64 * PAGE_SIZE);
        let (Ok(start), Ok(len)) = (usize::try_from(at), usize::try_from(end - at)) else {
            return Err(Errno::INVAL);
        };
        let pages = &mut pages[..len >> PAGE_SHIFT];
        // SAFETY: mincore writes one byte for each page of the range, which is as many as the slice has, and neither reads
        // nor changes the range itself.
        let done =
            unsafe { libc::mincore(std::ptr::with_exposed_provenance_mut(start), len, pages.as_mut_ptr()) };
        if done != 0 {
            return Err(crate::errno(&std::io::Error::last_os_error()));
        }
        for page in pages {
            let next = at + PAGE_SIZE;
            match found.last_mut().filter(|last| last.end == at) {
                _ if *page & 1 == 0 => {}
                Some(last) => last.end = next,
                None => found.push(at..next),
            }
            at = next;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;
    use crate::areas;

    const PAGES: u64 = 64;

    /// Maps a file of which some pages are written, and gives those that are told to be there.
    #[track_caller]
    fn check(file: &File, flags: MapFlags, expected: &[Range<u64>]) {
        file.set_len(PAGES * PAGE_SIZE).unwrap();
        for page in [3, 4, 9, PAGES - 1] {
            file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
        }
        let len = usize::try_from(PAGES * PAGE_SIZE).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0) };
        let base = base.unwrap();
        let start = base.addr() as u64;
        let area = areas().unwrap().into_iter().find(|area| (area.start..area.end).contains(&start)).unwrap();
        match area.resident(start..start + PAGES * PAGE_SIZE) {
            Ok(found) => {
                let page = |address: u64| (address - start) / PAGE_SIZE;
                let found: Vec<_> = found.into_iter().map(|part| page(part.start)..page(part.end)).collect();
                assert_eq!(found, expected);
            }
            Err(errno) => eprintln!("skipped: this kernel has no PAGEMAP_SCAN: {errno}"),
        }
        // SAFETY: the mapping is the test's own and nothing refers to it any more.
        unsafe { munmap(base, len) }.unwrap();
    }

    #[test]
    fn shared_memory_that_was_filled_before_it_was_mapped_is_there() {
        let memfd = || File::from(memfd_create("premap-resident", MemfdFlags::empty()).unwrap());
        let written = [3..5, 9..10, PAGES - 1..PAGES];
        check(&memfd(), MapFlags::SHARED, &written);
        // Written, its pages would be copied.
        check(&memfd(), MapFlags::PRIVATE, &[]);
        let path = format!("/dev/shm/premap-resident-{}", std::process::id());
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let Ok(file) = file else { return eprintln!("skipped: no /dev/shm") };
        check(&file, MapFlags::SHARED, &written);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn only_what_is_in_both_lists_counts() {
        assert_eq!(both(&[0..4, 6..9], &[2..7, 8..20]), [2..4, 6..7, 8..9]);
        assert_eq!(both(&[0..4, 8..9], &[4..8, 10..12]), []);
        assert_eq!(both(&[], &[0..8, 9..10]), []);
    }
}
