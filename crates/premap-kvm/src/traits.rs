//! The traits that a KVM implements: Linux's through file descriptors, a software one directly.
// UNSAFETY: declares unsafe methods; no unsafe code runs here.
#![expect(unsafe_code, reason = "memory that KVM writes is the caller's promise")]

use crate::abi::{kvm_enable_cap, kvm_pre_fault_memory, kvm_userspace_memory_region};
use crate::{Result, Stats};

/// A virtual machine: each method is one ioctl on its descriptor.
pub trait Vm {
    /// `KVM_CHECK_EXTENSION`: 0 where the capability is missing, else a positive number whose meaning is the
    /// capability's own.
    ///
    /// # Errors
    /// The kernel's errno.
    fn check_extension(&self, capability: u32) -> Result<u32>;

    /// `KVM_ENABLE_CAP` on the VM.
    ///
    /// # Errors
    /// EINVAL for a capability that this kernel lacks or whose arguments it refuses.
    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()>;

    /// `KVM_SET_USER_MEMORY_REGION`: makes, moves or re-flags a memslot; a size of 0 deletes it.
    ///
    /// # Errors
    /// EINVAL for unaligned or unknown values, EEXIST for a slot that overlaps another, ENOMEM.
    ///
    /// # Safety
    /// From here on the guest, and pre-faulting, read and write `memory_size` bytes at `userspace_addr`: they must
    /// belong to this VM, and whatever aliases them in this process must expect them to change at any moment, until
    /// the slot is deleted or the VM is gone.
    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()>;

    /// `KVM_GET_DIRTY_LOG`: which pages of the slot were written since the last call, a bit a page.
    ///
    /// # Errors
    /// ENOENT for a slot that is not there or does not log.
    ///
    /// # Safety
    /// KVM writes a bit for each page of the slot, rounded up to 64, and is not told where `bitmap` ends: it must be
    /// that long.
    unsafe fn get_dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> Result<()>;

    /// The VM's binary statistics: `pages_4k`, `pages_2m`, `pages_1g` and more.
    ///
    /// # Errors
    /// ENOTTY on kernels before 5.14, or what reading the descriptor gives.
    fn stats(&self) -> Result<Stats>;
}

/// A virtual CPU. Its ioctls take `&mut self`: KVM holds the vCPU's mutex throughout, so a shared one would only wait.
pub trait Vcpu {
    /// `KVM_PRE_FAULT_MEMORY`: maps `range` at the second stage as a *read* would, and shrinks it by what was done.
    ///
    /// After any progress it gives `Ok` with the range advanced; an error means that nothing of `range` was done and it
    /// is unchanged.
    ///
    /// # Errors
    /// ENOTTY before Linux 6.11; EOPNOTSUPP where this MMU or this moment of the vCPU has no pre-fault; ENOENT no
    /// memslot; EFAULT no host memory; EINVAL, EINTR, EAGAIN, EHWPOISON, ENOMEM, EIO as `kvm_pre_fault_memory` has them.
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()>;

    /// Makes the vCPU give up the page-table root that it holds, so that its next use takes the current one. Its state is
    /// the same afterwards.
    ///
    /// A root goes stale when a memslot is deleted or moved. `KVM_RUN` takes a new one by itself; before Linux 6.15 a
    /// pre-fault doesn't, and spins until a signal comes.
    ///
    /// # Errors
    /// What `KVM_GET_SREGS` and `KVM_SET_SREGS` give: EINVAL for a vCPU whose state is protected.
    fn renew_root(&mut self) -> Result<()>;

    /// The vCPU's binary statistics: `pf_taken`, `exits` and more.
    ///
    /// # Errors
    /// ENOTTY on kernels before 5.14, or what reading the descriptor gives.
    fn stats(&self) -> Result<Stats>;
}

impl<V: Vcpu + ?Sized> Vcpu for &mut V {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
        (**self).pre_fault_memory(range)
    }

    fn renew_root(&mut self) -> Result<()> {
        (**self).renew_root()
    }

    fn stats(&self) -> Result<Stats> {
        (**self).stats()
    }
}
