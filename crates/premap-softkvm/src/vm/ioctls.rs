//! The trait by which the rest of premap sees a VM.
// UNSAFETY: implements a trait with unsafe methods, and runs no unsafe code itself: what the callers promise is used in
// `access`.
#![expect(unsafe_code, reason = "the trait's methods are unsafe to call")]

use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, kvm_enable_cap, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use premap_kvm::{Errno, Stats, Vm};

use super::SoftVm;
use crate::stats;

impl Vm for SoftVm {
    fn check_extension(&self, capability: u32) -> Result<u32, Errno> {
        self.machine.check_alive()?;
        Ok(self.machine.capability(capability))
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        self.machine.check_alive()?;
        self.machine.enable_cap(cap)
    }

    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
        self.machine.check_alive()?;
        if region.flags & KVM_MEM_GUEST_MEMFD != 0 {
            // The struct has no room to say which.
            return Err(Errno::INVAL);
        }
        self.machine.set_memory_region(&kvm_userspace_memory_region2 {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
            ..Default::default()
        })
    }

    unsafe fn get_dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> Result<(), Errno> {
        self.machine.check_alive()?;
        self.machine.dirty_log(slot, bitmap)
    }

    fn stats(&self) -> Result<Stats, Errno> {
        let mut leaves = self.machine.leaves();
        leaves.size_4k += self.machine.td.as_ref().map_or(0, |td| td.pages());
        Ok(stats::vm(leaves, self.machine.roots.flushes() + self.machine.shadow.flushes()))
    }
}
