//! The pages of a stretch of memory that this process has, and are more than the zero page.

use std::fs::File;
use std::ops::Range;

use premap_address::Hva;
use rustix::io::Errno;

use crate::errno;
use crate::scan::{FILE, PRESENT, Region, Wanted, ZERO, scan};

/// How many ranges one call can give.
const AT_ONCE: usize = 256;

/// Gives the parts of `range` whose pages are present, in ascending order. The zero page does not count: it stands for no
/// memory yet.
///
/// # Errors
/// The kernel's errno; ENOTTY before Linux 6.7.
pub fn present(range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    find(range, Wanted { inverted: ZERO, all: PRESENT | ZERO, told: PRESENT, ..Wanted::default() })
}

/// Gives the parts of `range`, a private mapping of a file, that were written: their pages are copies of the process's own,
/// where others are the page cache's.
///
/// # Errors
/// As [`present`].
pub fn copied(range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    find(
        range,
        Wanted { inverted: ZERO | FILE, all: PRESENT | ZERO | FILE, told: PRESENT, ..Wanted::default() },
    )
}

fn find(range: Range<u64>, wanted: Wanted) -> Result<Vec<Range<u64>>, Errno> {
    let pagemap = File::open("/proc/self/pagemap").map_err(|error| errno(&error))?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut rest = Hva::new(range.start)..Hva::new(range.end);
    while rest.start < rest.end {
        let mut regions = [Region::default(); AT_ONCE];
        let (regions, end) = scan(&pagemap, &rest, wanted, &mut regions)?;
        for region in regions {
            match found.last_mut().filter(|last| last.end == region.start) {
                Some(last) => last.end = region.end,
                None => found.push(region.start..region.end),
            }
        }
        if end <= rest.start {
            break;
        }
        rest.start = end;
    }
    Ok(found)
}

// UNSAFETY: maps anonymous memory of its own.
#[cfg(test)]
#[expect(unsafe_code, reason = "mmap and raw pointers")]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    #[test]
    fn pages_that_were_written_are_present_and_others_are_not() {
        const PAGES: u64 = 2_000;
        let len = usize::try_from(PAGES * 4096).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .unwrap();
        // SAFETY: the mapping is the test's own. Huge pages would make more present than was written.
        unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxNoHugepage) }.unwrap();
        let page = |number: u64| base.wrapping_byte_add(usize::try_from(number * 4096).unwrap()).cast::<u8>();
        // More ranges than one call gives, and a page that was only read.
        for number in (0..PAGES).step_by(2) {
            // SAFETY: the page lies in the test's own mapping.
            unsafe { page(number).write_volatile(1) };
        }
        // SAFETY: as above.
        unsafe { page(1).read_volatile() };
        let start = base.addr() as u64;
        match present(start..start + PAGES * 4096) {
            Ok(found) => {
                let expected: Vec<_> = (0..PAGES)
                    .step_by(2)
                    .map(|number| start + number * 4096..start + (number + 1) * 4096)
                    .collect();
                assert_eq!(found, expected);
            }
            Err(errno) => eprintln!("skipped: this kernel has no PAGEMAP_SCAN: {errno}"),
        }
        // SAFETY: the mapping is the test's own and nothing refers to it any more.
        unsafe { munmap(base, len) }.unwrap();
    }

    #[test]
    fn of_a_private_file_only_written_pages_are_copies() {
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        let (len, access) = (8 * 4096, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::PRIVATE, &file, 0) };
        let base = base.unwrap();
        for page in 0..4 {
            // SAFETY: the page lies in the test's own mapping, and in the file, which is longer.
            unsafe { base.wrapping_byte_add(page * 4096).cast::<u8>().read_volatile() };
        }
        // SAFETY: as above.
        unsafe { base.wrapping_byte_add(2 * 4096).cast::<u8>().write_volatile(1) };
        let start = base.addr() as u64;
        match copied(start..start + len as u64) {
            Ok(found) => {
                let copy = start + 2 * 4096..start + 3 * 4096;
                assert_eq!((found.first(), found.len()), (Some(&copy), 1));
            }
            Err(errno) => eprintln!("skipped: this kernel has no PAGEMAP_SCAN: {errno}"),
        }
        // SAFETY: the mapping is the test's own and nothing refers to it any more.
        unsafe { munmap(base, len) }.unwrap();
    }
}
