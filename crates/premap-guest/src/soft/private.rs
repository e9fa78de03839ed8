//! Private memory on the software KVM.
// UNSAFETY: an unsafe method passed through.
#![expect(unsafe_code, reason = "the trait's method is unsafe to call")]

use premap_kvm::Errno;
use premap_kvm::abi::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use rustix::fs::FallocateFlags;

use super::SoftMachineVm;
use crate::private::{FileOperation, GuestMemfd, PrivateMemory};

impl PrivateMemory for SoftMachineVm {
    type GuestMemfd = premap_softkvm::GuestMemfd;

    fn create_guest_memfd(
        &self,
        request: &kvm_create_guest_memfd,
    ) -> premap_kvm::Result<premap_softkvm::GuestMemfd> {
        self.vm.create_guest_memfd(request)
    }

    unsafe fn set_user_memory_region2(
        &self,
        region: &kvm_userspace_memory_region2,
    ) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.vm.set_user_memory_region2(region) }
    }

    fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> premap_kvm::Result<()> {
        self.vm.set_memory_attributes(request)
    }
}

impl GuestMemfd for premap_softkvm::GuestMemfd {
    fn number(&self) -> u32 {
        self.number()
    }

    fn inode(&self) -> premap_kvm::Result<u64> {
        self.inode()
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> premap_kvm::Result<()> {
        self.fallocate(mode, offset, bytes)
    }

    /// The file operations that a guest_memfd lacks, each with the errno that Linux has for a file without it.
    fn attempt(&self, operation: FileOperation) -> premap_kvm::Result<()> {
        Err(match operation {
            FileOperation::Read | FileOperation::Write | FileOperation::Truncate => Errno::INVAL,
            FileOperation::Map => Errno::NODEV,
        })
    }
}
