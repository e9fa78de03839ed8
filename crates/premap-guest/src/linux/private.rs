//! Private memory on `/dev/kvm`.
// UNSAFETY: a descriptor that the kernel has just made is owned, a mapping that can't come to be is asked for, and an unsafe
// method is passed through.
#![expect(unsafe_code, reason = "descriptors by number, mmap, and a trait's unsafe method")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use kvm_bindings::{KVM_EXIT_MEMORY_FAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_run};
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::abi::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use premap_softkvm::MemoryFault;
use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::{LinuxVm, errno};
use crate::private::{FileOperation, GuestMemfd, PrivateMemory};

/// A guest_memfd of a VM on `/dev/kvm`.
#[derive(Debug)]
pub struct LinuxGuestMemfd(OwnedFd);

impl PrivateMemory for LinuxVm {
    type GuestMemfd = LinuxGuestMemfd;

    fn create_guest_memfd(&self, request: &kvm_create_guest_memfd) -> Result<LinuxGuestMemfd, Errno> {
        let number = self.fd.0.create_guest_memfd(*request).map_err(errno)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(LinuxGuestMemfd(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    unsafe fn set_user_memory_region2(&self, region: &kvm_userspace_memory_region2) -> Result<(), Errno> {
        // SAFETY: the same contract.
        unsafe { self.fd.0.set_user_memory_region2(*region) }.map_err(errno)
    }

    fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> Result<(), Errno> {
        self.fd.0.set_memory_attributes(*request).map_err(errno)
    }
}

impl GuestMemfd for LinuxGuestMemfd {
    fn number(&self) -> u32 {
        self.0.as_raw_fd().unsigned_abs()
    }

    fn inode(&self) -> Result<u64, Errno> {
        Ok(rustix::fs::fstat(&self.0)?.st_ino)
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(&self.0, mode, offset, bytes)
    }

    fn attempt(&self, operation: FileOperation) -> Result<(), Errno> {
        const LEN: usize = 4096;
        let mut page = [0; LEN];
        match operation {
            FileOperation::Read => rustix::io::read(&self.0, &mut page).map(drop),
            FileOperation::Write => rustix::io::write(&self.0, &page).map(drop),
            FileOperation::Truncate => rustix::fs::ftruncate(&self.0, PAGE_SIZE),
            FileOperation::Map => {
                let protection = ProtFlags::READ | ProtFlags::WRITE;
                // SAFETY: a new mapping, at an address of the kernel's choice, that nobody will touch.
                let mapped = unsafe {
                    rustix::mm::mmap(ptr::null_mut(), LEN, protection, MapFlags::SHARED, &self.0, 0)
                }?;
                // SAFETY: the mapping that was just made, against all expectation, and is nobody's yet.
                unsafe { rustix::mm::munmap(mapped, LEN) }
            }
        }
    }
}

/// Whether these flags of a memory fault say that private memory was wanted.
pub(super) fn is_private(flags: u64) -> bool {
    flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0
}

/// What `kvm_run` says of a page that could not be had, if that is what it says.
pub(super) fn left_in(run: &kvm_run) -> Option<MemoryFault> {
    if run.exit_reason != KVM_EXIT_MEMORY_FAULT {
        return None;
    }
    // SAFETY: the exit reason says which of the union's fields was written; all of them are plain numbers.
    let fault = unsafe { run.__bindgen_anon_1.memory_fault };
    Some(MemoryFault {
        range: GpaRange::try_new(Gpa::new(fault.gpa), fault.size).ok()?,
        private: is_private(fault.flags),
    })
}
