//! Which pages of a stretch of memory this process has: asked by `PAGEMAP_SCAN`, which Linux has since 6.7.
//!
//! After slots changed, only what the host has is mapped again. What was given back meanwhile, by a balloon say, stays
//! given back.
// UNSAFETY: an ioctl that reads and writes the structs given to it.
#![expect(unsafe_code, reason = "an ioctl on /proc/self/pagemap")]

use std::fs::File;
use std::ops::Range;

use premap_kvm::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `PAGEMAP_SCAN`, on a pagemap file.
const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArgument>(b'f', 16);
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The shared zero page, which a write replaces.
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// How many ranges one call can give.
const ROOM: usize = 256;

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Gives the parts of `range` whose pages are present, in ascending order.
///
/// # Errors
/// The kernel's errno; ENOTTY before Linux 6.7.
pub(crate) fn present(range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    let pagemap = File::open("/proc/self/pagemap")
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let mut regions = [PageRegion::default(); ROOM];
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end: range.end,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: ROOM as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
            return_mask: PAGE_IS_PRESENT,
            ..Default::default()
        };
        // SAFETY: PAGEMAP_SCAN reads and writes one pm_scan_arg of the size that it names, and at most `vec_len` regions
        // behind `vec`, which lives until after the call. Without flags it changes no page.
        unsafe { ioctl(&pagemap, Updater::<{ PAGEMAP_SCAN }, _>::new(&mut argument)) }?;
        for region in regions.iter().take_while(|region| region.end > region.start) {
            match found.last_mut().filter(|last| last.end == region.start) {
                Some(last) => last.end = region.end,
                None => found.push(region.start..region.end),
            }
        }
        if argument.walk_end <= start {
            break;
        }
        start = argument.walk_end;
    }
    Ok(found)
}

#[cfg(test)]
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
}
