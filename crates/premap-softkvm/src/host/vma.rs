//! The mapping that covers an address: its extent, permissions and page size.
// UNSAFETY: one ioctl; its block argues that request number and argument belong together.
#![expect(unsafe_code, reason = "the PROCMAP_QUERY ioctl")]

use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};

use premap_address::{Hva, PageSize};
use premap_kvm::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// A mapping of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub(super) end: Hva,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) shared: bool,
    /// Whether a file is behind it. A memfd and shared anonymous memory are files too.
    pub(super) file: bool,
    /// The page size of its backing: more than 4 KiB for hugetlb alone.
    pub(super) page_size: PageSize,
}

/// `struct procmap_query` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: Opcode = opcode::read_write::<Query>(b'f', 17);
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const SHARED: u64 = 8;

/// The process's mappings.
#[derive(Debug)]
pub(super) struct Mappings {
    maps: File,
    /// Cleared by the first ENOTTY: a kernel before 6.11.
    has_query: AtomicBool,
}

impl Mappings {
    pub(super) fn open() -> Result<Self, Errno> {
        let maps = File::open("/proc/self/maps").map_err(|error| errno(&error))?;
        Ok(Self { maps, has_query: AtomicBool::new(true) })
    }

    /// The mapping that covers `hva`, if there is one.
    pub(super) fn covering(&self, hva: Hva) -> Result<Option<Vma>, Errno> {
        if self.has_query.load(Ordering::Relaxed) {
            match self.ask(hva) {
                Err(Errno::NOTTY) => self.has_query.store(false, Ordering::Relaxed),
                answer => return answer,
            }
        }
        // `smaps` rather than `maps`, for the page size; slow, and only for old kernels.
        let text = fs::read_to_string("/proc/self/smaps").map_err(|error| errno(&error))?;
        Ok(parse(&text, hva))
    }

    fn ask(&self, hva: Hva) -> Result<Option<Vma>, Errno> {
        let mut query = Query { size: size_of::<Query>() as u64, query_addr: hva.raw(), ..Query::default() };
        // SAFETY: PROCMAP_QUERY reads and writes one procmap_query of the size that it is told, and writes a name or a
        // build id only where their sizes are not zero, which they are.
        match unsafe { ioctl(&self.maps, Updater::<PROCMAP_QUERY, _>::new(&mut query)) } {
            Ok(()) => Ok(Some(Vma {
                end: Hva::new(query.vma_end),
                read: query.vma_flags & READABLE != 0,
                write: query.vma_flags & WRITABLE != 0,
                shared: query.vma_flags & SHARED != 0,
                file: query.inode != 0,
                page_size: page_size(query.vma_page_size),
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn page_size(bytes: u64) -> PageSize {
    PageSize::ALL.into_iter().rev().find(|size| bytes >= size.bytes()).unwrap_or(PageSize::Size4K)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Finds the mapping in the text of `/proc/self/smaps`.
fn parse(text: &str, hva: Hva) -> Option<Vma> {
    let mut found = None;
    for line in text.lines() {
        if let Some(bytes) = line.strip_prefix("KernelPageSize:") {
            if let Some(vma) = found {
                let kib: u64 = bytes.trim().strip_suffix("kB")?.trim().parse().ok()?;
                return Some(Vma { page_size: page_size(kib * 1024), ..vma });
            }
        } else if let Some(vma) = header(line, hva) {
            found = Some(vma);
        }
    }
    found
}

/// A line such as `7f0000000000-7f0000001000 rw-p 00000000 00:01 42 /memfd:x`, if it covers `hva`.
fn header(line: &str, hva: Hva) -> Option<Vma> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok().map(Hva::new);
    let (start, end) = (number(start)?, number(end)?);
    let &[read, write, _, shared] = words.next()?.as_bytes() else { return None };
    let inode = words.nth(2)?;
    (start..end).contains(&hva).then_some(Vma {
        end,
        read: read == b'r',
        write: write == b'w',
        shared: shared == b's',
        file: inode != "0",
        page_size: PageSize::Size4K,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
KernelPageSize:        4 kB
7f0000200000-7f0000600000 rw-s 00000000 00:10 77                         /memfd:guest (deleted)
KernelPageSize:     2048 kB
7f0000600000-7f0000601000 ---p 00000000 00:00 0
KernelPageSize:        4 kB
";

    fn check(hva: u64, expected: Option<(bool, bool, bool, PageSize)>) {
        let found = parse(SMAPS, Hva::new(hva)).map(|vma| (vma.read, vma.shared, vma.file, vma.page_size));
        assert_eq!(found, expected, "{hva:#x}");
    }

    #[test]
    fn the_text_of_smaps_tells_what_the_ioctl_would() {
        check(0x7f00_0000_0000, Some((true, false, false, PageSize::Size4K)));
        check(0x7f00_003f_f000, Some((true, true, true, PageSize::Size2M)));
        check(0x7f00_0060_0fff, Some((false, false, false, PageSize::Size4K)));
        check(0x7f00_0060_1000, None);
        check(0x1000, None);
    }

    #[test]
    fn both_ways_agree_on_this_process() {
        let mappings = Mappings::open().unwrap();
        let here = Hva::new(std::ptr::from_ref(SMAPS).addr() as u64);
        let asked = mappings.covering(here).unwrap().unwrap();
        mappings.has_query.store(false, Ordering::Relaxed);
        assert_eq!(mappings.covering(here).unwrap(), Some(asked));
        assert_eq!(mappings.covering(Hva::new(0)).unwrap(), None);
        assert!(asked.read && !asked.write && asked.file);
    }
}
