//! The mapping that covers an address: its extent, permissions and page size.
// UNSAFETY: one ioctl; its block argues that request number and argument belong together.
#![expect(unsafe_code, reason = "the PROCMAP_QUERY ioctl")]

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

use premap_address::{Hva, PageSize};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::smaps::{Area, areas};
use crate::{Unopened, errno, open};

/// A mapping of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) end: Hva,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) shared: bool,
    /// Whether a file is behind it. A memfd and shared anonymous memory are files too.
    pub(crate) file: bool,
    /// The page size of its backing: more than 4 KiB for hugetlb alone.
    pub(crate) page_size: PageSize,
}

impl Mapping {
    fn of(area: &Area) -> Self {
        let Area { end, readable, writable, shared, page_bytes, ref file, .. } = *area;
        Self {
            end: Hva::new(end),
            read: readable,
            write: writable,
            shared,
            file: file.is_some(),
            page_size: page_size(page_bytes),
        }
    }
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

/// The ioctl on `/proc/self/maps` that tells of one mapping.
pub const PROCMAP_QUERY: Opcode = opcode::read_write::<Query>(b'f', 17);
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const SHARED: u64 = 8;

/// The process's mappings.
#[derive(Debug)]
pub(crate) struct Mappings {
    maps: File,
    /// Cleared by the first ENOTTY: a kernel before 6.11.
    has_query: AtomicBool,
}

impl Mappings {
    pub(crate) fn open() -> Result<Self, Unopened> {
        Ok(Self { maps: open("/proc/self/maps")?, has_query: AtomicBool::new(true) })
    }

    /// The mapping that covers `hva`, if there is one.
    pub(crate) fn covering(&self, hva: Hva) -> Result<Option<Mapping>, Errno> {
        if self.has_query.load(Ordering::Relaxed) {
            match self.ask(hva) {
                Err(Errno::NOTTY) => self.has_query.store(false, Ordering::Relaxed),
                answer => return answer,
            }
        }
        // Slow, and only for old kernels.
        let areas = areas().map_err(|error| errno(&error))?;
        let covering = areas.iter().find(|area| (area.start..area.end).contains(&hva.raw()));
        Ok(covering.map(Mapping::of))
    }

    fn ask(&self, hva: Hva) -> Result<Option<Mapping>, Errno> {
        let mut query = Query { size: size_of::<Query>() as u64, query_addr: hva.raw(), ..Query::default() };
        // SAFETY: PROCMAP_QUERY reads and writes one procmap_query of the size that it is told, and writes a name or a
        // build id only where their sizes are not zero, which they are.
        match unsafe { ioctl(&self.maps, Updater::<PROCMAP_QUERY, _>::new(&mut query)) } {
            Ok(()) => Ok(Some(Mapping {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_agree_on_this_process() {
        let mappings = Mappings::open().unwrap();
        let here = Hva::new(std::ptr::from_ref("a constant").addr() as u64);
        let asked = mappings.covering(here).unwrap().unwrap();
        mappings.has_query.store(false, Ordering::Relaxed);
        assert_eq!(mappings.covering(here).unwrap(), Some(asked));
        assert_eq!(mappings.covering(Hva::new(0)).unwrap(), None);
        assert!(asked.read && !asked.write && asked.file);
    }
}
