//! `PAGEMAP_SCAN`, which Linux has since 6.7: which pages of a range are in which of its categories.
// UNSAFETY: one ioctl; its block argues that the kernel writes only where it is told to.
#![expect(unsafe_code, reason = "the PAGEMAP_SCAN ioctl")]

use std::fs::File;
use std::ops::Range;

use premap_address::Hva;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// A page of a file, and not a copy of it.
pub(crate) const FILE: u64 = 1 << 2;
pub(crate) const PRESENT: u64 = 1 << 3;
/// The shared zero page, which a write replaces.
pub(crate) const ZERO: u64 = 1 << 5;
pub(crate) const HUGE: u64 = 1 << 6;

/// The ioctl on `/proc/self/pagemap` that tells of a range's pages.
pub const PAGEMAP_SCAN: Opcode = opcode::read_write::<Argument>(b'f', 16);

/// `struct page_region` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Argument {
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

/// Which pages are told: those in all of `all` and, unless it is empty, in one of `any`. A category in `inverted` means
/// the pages that are not in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) inverted: u64,
    pub(crate) all: u64,
    pub(crate) any: u64,
    /// Which categories are told of a page.
    pub(crate) told: u64,
}

/// Scans `range` into `regions`, as many as have room, and gives those found and how far the scan came.
pub(crate) fn scan<'a>(
    pagemap: &File,
    range: &Range<Hva>,
    wanted: Wanted,
    regions: &'a mut [Region],
) -> Result<(&'a [Region], Hva), Errno> {
    regions.fill(Region::default());
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        start: range.start.raw(),
        end: range.end.raw(),
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: regions.len() as u64,
        category_inverted: wanted.inverted,
        category_mask: wanted.all,
        category_anyof_mask: wanted.any,
        return_mask: wanted.told,
        ..Argument::default()
    };
    // SAFETY: PAGEMAP_SCAN reads and writes one pm_scan_arg and writes at most `vec_len` regions at `vec`: the slice above,
    // of that length, which is borrowed mutably for the call. Without PM_SCAN_WP_MATCHING it changes no page table.
    unsafe { ioctl(pagemap, Updater::<PAGEMAP_SCAN, _>::new(&mut argument)) }?;
    // The ioctl's return value, the number of regions, is lost in the pattern; empty regions end the list.
    let found = regions.iter().take_while(|region| region.end != 0).count();
    Ok((&regions[..found], Hva::new(argument.walk_end).min(range.end)))
}
