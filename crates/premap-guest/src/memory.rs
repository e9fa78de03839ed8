//! Guest memory of every backing, as an owned mapping.
//!
//! A [`Memory`] starts on a 2 MiB boundary, so that a guest address with the same offset can be mapped by huge pages.
//! Its content is reached a word at a time, atomically: a guest may write it at any moment, so no reference into it is
//! ever given out.
// UNSAFETY: mmap, madvise and words behind raw pointers. The mapping is owned, its bounds are kept, and every access is
// checked against them.
#![expect(unsafe_code, reason = "owns a mapping that guests write")]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use premap_address::{Gpa, GpaRange, Hva, PAGE_SIZE};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::backing::{Backing, private_file};
use crate::error::{MemoryError, os};

const ALIGN: usize = 2 << 20;

/// A piece of guest memory: mapped when made, unmapped when dropped.
#[derive(Debug)]
pub struct Memory {
    base: *mut c_void,
    len: usize,
    backing: Backing,
    revoked: Vec<Range<u64>>,
}

// SAFETY: the mapping belongs to no thread, and its words are only reached atomically.
unsafe impl Send for Memory {}
// SAFETY: as above; `&Memory` gives atomic access and madvise, both safe from many threads.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `bytes` of memory. Nothing is populated yet, except the page cache of [`Backing::File`].
    ///
    /// # Errors
    /// A size that is zero or no multiple of the backing's page size, too few free hugetlb pages, or what the kernel
    /// refuses.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        let page = backing.page_size().bytes();
        if bytes == 0 || !bytes.is_multiple_of(page) {
            return Err(MemoryError::Size { bytes, backing, page });
        }
        backing.check_room(bytes)?;
        let len = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes, backing, page })?;
        let memory = Self::reserve(len, backing)?;
        match backing {
            Backing::Anonymous => {
                memory.place(None, MapFlags::PRIVATE)?;
                memory.advise(0..bytes, Advice::LinuxNoHugepage, "MADV_NOHUGEPAGE")?;
            }
            Backing::TransparentHuge => {
                memory.place(None, MapFlags::PRIVATE)?;
                memory.advise(0..bytes, Advice::LinuxHugepage, "MADV_HUGEPAGE")?;
            }
            Backing::Hugetlb => {
                memory.place(None, MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB)?
            }
            Backing::Memfd => {
                let fd = memfd(bytes)?;
                memory.place(Some(fd.as_fd()), MapFlags::SHARED)?;
            }
            Backing::File => {
                let fd = private_file(bytes)?;
                memory.place(Some(fd.as_fd()), MapFlags::PRIVATE)?;
            }
        }
        Ok(memory)
    }

    /// Where the memory starts in this process.
    #[must_use]
    pub fn hva(&self) -> Hva {
        Hva::new(self.base.expose_provenance() as u64)
    }

    /// The length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len as u64
    }

    /// The memory as the engine wants it described, from `gpa` on in the guest.
    ///
    /// # Panics
    /// If `gpa` is not on a page, or the memory would reach beyond the last address.
    #[must_use]
    #[track_caller]
    pub fn region(&self, gpa: Gpa, touch: premap::Touch) -> premap::Region {
        let backing = match self.backing {
            Backing::Anonymous | Backing::TransparentHuge => premap::Backing::Anonymous,
            Backing::Memfd => premap::Backing::Shared,
            Backing::Hugetlb => premap::Backing::Hugetlb(self.backing.page_size()),
            Backing::File => premap::Backing::PrivateFile,
        };
        premap::Region { range: GpaRange::new(gpa, self.bytes()), host: self.hva(), backing, touch }
    }

    /// What the memory is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Reads the word at `offset`, as a guest's read would.
    ///
    /// # Panics
    /// If the word is unaligned, beyond the end, or in a part that was [revoked](Self::revoke).
    #[must_use]
    #[track_caller]
    pub fn read_word(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Writes the word at `offset`, as a guest's write would.
    ///
    /// # Panics
    /// As [`read_word`](Self::read_word).
    #[track_caller]
    pub fn write_word(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// Gives pages back to the host: MADV_DONTNEED, or MADV_REMOVE where the memory is shared. They read as zero, or
    /// as the file's content, when they are touched again. In a slot, [`Slots::discard`](crate::Slots::discard) does it.
    ///
    /// # Errors
    /// What madvise gives.
    pub fn discard(&mut self, part: Range<u64>) -> Result<(), MemoryError> {
        match self.backing {
            Backing::Memfd => self.advise(part, Advice::LinuxRemove, "MADV_REMOVE"),
            _ => self.advise(part, Advice::LinuxDontNeed, "MADV_DONTNEED"),
        }
    }

    /// Takes a part away for good: the addresses stay reserved, and whoever touches them gets EFAULT or a signal. In a
    /// slot, [`Slots::revoke`](crate::Slots::revoke) does it.
    ///
    /// # Errors
    /// What mmap gives.
    ///
    /// # Panics
    /// If the part is not within the memory or not of whole pages.
    pub fn revoke(&mut self, part: Range<u64>) -> Result<(), MemoryError> {
        let (at, len) = self.part(&part);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: `part` lies within the mapping that is ours, and no reference into it is ever given out.
        unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) }.map_err(os("mmap"))?;
        self.revoked.push(part);
        Ok(())
    }

    /// Reserves aligned addresses for `len` bytes, inaccessible as yet.
    fn reserve(len: usize, backing: Backing) -> Result<Self, MemoryError> {
        let total = len
            .checked_add(ALIGN)
            .ok_or(MemoryError::Os { what: "mmap", errno: rustix::io::Errno::NOMEM })?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping where the kernel likes it; nothing is replaced.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), total, ProtFlags::empty(), flags) }
            .map_err(os("mmap"))?;
        let head = start.addr().next_multiple_of(ALIGN) - start.addr();
        let base = start.wrapping_byte_add(head);
        for (at, len) in [(start, head), (base.wrapping_byte_add(len), ALIGN - head)] {
            if len > 0 {
                // SAFETY: head and tail of the reservation made above, which nobody knows of yet.
                unsafe { rustix::mm::munmap(at, len) }.map_err(os("munmap"))?;
            }
        }
        Ok(Self { base, len, backing, revoked: Vec::new() })
    }

    /// Puts real memory in the place of the reservation.
    fn place(&self, fd: Option<BorrowedFd<'_>>, flags: MapFlags) -> Result<(), MemoryError> {
        let (access, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, flags | MapFlags::FIXED | MapFlags::NORESERVE);
        // Hugetlb alone reserves its pages, so that a pool too small is told here and not by a SIGBUS later.
        let flags =
            if self.backing == Backing::Hugetlb { flags.difference(MapFlags::NORESERVE) } else { flags };
        // SAFETY: the reservation is ours and whole, and no reference into it is ever given out.
        let placed = unsafe {
            match fd {
                Some(fd) => rustix::mm::mmap(self.base, self.len, access, flags, fd, 0),
                None => rustix::mm::mmap_anonymous(self.base, self.len, access, flags),
            }
        };
        placed.map(|_| ()).map_err(os("mmap"))
    }

    fn advise(&self, part: Range<u64>, advice: Advice, what: &'static str) -> Result<(), MemoryError> {
        let (at, len) = self.part(&part);
        // SAFETY: the part is ours; the advices used here change how it is backed or give pages back, and words are only
        // reached atomically, so nobody relies on what they held.
        unsafe { rustix::mm::madvise(at, len, advice) }.map_err(os(what))
    }

    #[track_caller]
    fn part(&self, part: &Range<u64>) -> (*mut c_void, usize) {
        let whole = part.start.is_multiple_of(PAGE_SIZE) && part.end.is_multiple_of(PAGE_SIZE);
        assert!(
            whole && part.start <= part.end && part.end <= self.bytes(),
            "{part:x?} is no part of the memory"
        );
        let index = |offset| usize::try_from(offset).expect("below the length, which is a usize");
        (self.base.wrapping_byte_add(index(part.start)), index(part.end - part.start))
    }

    #[track_caller]
    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < self.bytes(), "no word at {offset:#x} in the memory");
        assert!(!self.revoked.iter().any(|part| part.contains(&offset)), "{offset:#x} was revoked");
        let index = usize::try_from(offset).expect("below the length, which is a usize");
        // SAFETY: aligned and within the mapping, which is readable and writable outside the revoked parts and lives as
        // long as `self`; all access in this process is atomic, and the guest's is the hardware's.
        unsafe { AtomicU64::from_ptr(self.base.byte_add(index).cast()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and its last user, a memslot, was deleted before (see `slots`).
        let unmapped = unsafe { rustix::mm::munmap(self.base, self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an owned mapping failed: {unmapped:?}");
    }
}

fn memfd(bytes: u64) -> Result<OwnedFd, MemoryError> {
    let fd = rustix::fs::memfd_create("premap-guest", MemfdFlags::CLOEXEC).map_err(os("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(os("ftruncate"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use premap_address::PageSize;

    use super::*;

    const BYTES: u64 = 4 << 20;

    #[test]
    fn each_backing_holds_what_is_written_and_is_aligned() {
        for backing in [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd, Backing::File] {
            let memory = Memory::new(BYTES, backing).unwrap();
            assert!(memory.hva().is_aligned(PageSize::Size2M), "{backing}");
            for index in 0..BYTES / PAGE_SIZE {
                memory.write_word(index * PAGE_SIZE, !index);
            }
            for index in 0..BYTES / PAGE_SIZE {
                assert_eq!(memory.read_word(index * PAGE_SIZE), !index, "{backing}");
            }
        }
    }

    #[test]
    fn a_private_file_has_content_before_the_first_write() {
        let mut memory = Memory::new(BYTES, Backing::File).unwrap();
        let first = memory.read_word(0);
        assert_ne!(first, 0);
        memory.write_word(0, 1);
        memory.discard(0..PAGE_SIZE).unwrap();
        assert_eq!(memory.read_word(0), first, "a private mapping must not write its file");
    }

    #[test]
    fn discarded_pages_read_as_zero() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let mut memory = Memory::new(BYTES, backing).unwrap();
            memory.write_word(PAGE_SIZE, 7);
            memory.write_word(0, 7);
            memory.discard(PAGE_SIZE..2 * PAGE_SIZE).unwrap();
            assert_eq!((memory.read_word(0), memory.read_word(PAGE_SIZE)), (7, 0), "{backing}");
        }
    }

    #[test]
    #[should_panic(expected = "was revoked")]
    fn a_revoked_part_is_not_read() {
        let mut memory = Memory::new(BYTES, Backing::Anonymous).unwrap();
        memory.revoke(0..PAGE_SIZE).unwrap();
        let _ = memory.read_word(8);
    }

    #[test]
    #[should_panic(expected = "no word at")]
    fn a_word_beyond_the_end_is_not_read() {
        let _ = Memory::new(BYTES, Backing::Anonymous).unwrap().read_word(BYTES);
    }

    #[test]
    fn sizes_that_make_no_pages_are_refused() {
        for (bytes, backing) in [(0, Backing::Anonymous), (3, Backing::Memfd), (PAGE_SIZE, Backing::Hugetlb)]
        {
            assert!(
                matches!(Memory::new(bytes, backing), Err(MemoryError::Size { .. })),
                "{bytes} {backing}"
            );
        }
    }
}
