//! The bytes of a guest_memfd: a file without a name, mapped where only the software KVM looks.
// UNSAFETY: maps memory, and unmaps it when its owner goes.
#![expect(unsafe_code, reason = "mmap and munmap")]

use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use premap_address::{Hva, PAGE_SIZE};
use premap_kvm::Errno;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Memory that is made when it is touched, and goes with the value.
#[derive(Debug)]
pub(super) struct Memory {
    file: OwnedFd,
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the pointer is an address only; what lies behind it is touched by guests, atomically, and by system calls.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves so many pages.
    pub(super) fn new(pages: u64) -> Result<Self, Errno> {
        let length = pages.checked_mul(PAGE_SIZE).ok_or(Errno::INVAL)?;
        let bytes = usize::try_from(length).map_err(|_| Errno::INVAL)?;
        let file = memfd_create("softkvm-guest_memfd", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, length)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { mmap(ptr::null_mut(), bytes, protection, flags, &file, 0) }?;
        start.expose_provenance();
        Ok(Self { file, start, bytes })
    }

    /// The descriptor's number.
    pub(super) fn number(&self) -> u32 {
        self.file.as_raw_fd().unsigned_abs()
    }

    pub(super) fn inode(&self) -> Result<u64, Errno> {
        Ok(fstat(&self.file)?.st_ino)
    }

    pub(super) fn pages(&self) -> u64 {
        self.bytes as u64 / PAGE_SIZE
    }

    /// Where a page lies.
    pub(super) fn hva(&self, page: u64) -> Hva {
        debug_assert!(page < self.pages());
        Hva::new(self.start.addr() as u64 + page * PAGE_SIZE)
    }

    /// Gives pages back to the host, or makes them present: at an offset and of a length in bytes.
    pub(super) fn fallocate(&self, flags: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno> {
        fallocate(&self.file, flags, offset, bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours. Every second-stage mapping of it was taken away when its descriptor was closed, and
        // who was about to make one holds this value until it has found out.
        let unmapped = unsafe { munmap(self.start, self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
