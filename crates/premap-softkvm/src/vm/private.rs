//! The ioctls of VMs with private memory.
// UNSAFETY: declares an unsafe method; no unsafe code runs here.
#![expect(unsafe_code, reason = "memory that guests write is the caller's promise")]

use premap_address::{Gfn, Gpa, GpaRange};
use premap_kvm::Errno;
use premap_kvm::abi::{
    KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2,
};

use super::SoftVm;
use crate::machine::Machine;
use crate::private::{GuestMemfd, Kind};

impl SoftVm {
    /// `KVM_CREATE_GUEST_MEMFD`: makes private memory, to be bound to slots.
    ///
    /// # Errors
    /// EINVAL: flags, or a size of 0 or one that is no multiple of 4 KiB. EIO: the VM is dead.
    pub fn create_guest_memfd(&self, request: &kvm_create_guest_memfd) -> Result<GuestMemfd, Errno> {
        self.machine.check_alive()?;
        self.machine.guest_memfds.create(&self.machine, request.size, request.flags)
    }

    /// `KVM_SET_USER_MEMORY_REGION2`: as [`set_user_memory_region`](premap_kvm::Vm::set_user_memory_region), and with
    /// `KVM_MEM_GUEST_MEMFD` the slot has private memory beside its shared one.
    ///
    /// # Errors
    /// Those of `set_user_memory_region`; EBADF: no such descriptor; EINVAL: the descriptor is something else, the part of
    /// it lies past its end or is another slot's, or an existing slot is to get or lose private memory.
    ///
    /// # Safety
    /// What `set_user_memory_region` asks for.
    pub unsafe fn set_user_memory_region2(&self, region: &kvm_userspace_memory_region2) -> Result<(), Errno> {
        self.machine.check_alive()?;
        self.machine.set_memory_region(region)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`: makes pages private (`KVM_MEMORY_ATTRIBUTE_PRIVATE`) or shared (0). Their mappings
    /// go, their content stays where it is.
    ///
    /// # Errors
    /// EINVAL: flags, an attribute that this VM lacks, a range that is empty, unaligned or wraps. EIO: the VM is dead.
    pub fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> Result<(), Errno> {
        self.machine.check_alive()?;
        self.machine.set_attributes(request)
    }
}

impl Machine {
    /// The attributes that pages of this VM can have.
    pub(super) fn supported_attributes(&self) -> u64 {
        if self.has_private_memory() { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 }
    }

    fn set_attributes(&self, request: &kvm_memory_attributes) -> Result<(), Errno> {
        if request.flags != 0 || request.attributes & !self.supported_attributes() != 0 {
            return Err(Errno::INVAL);
        }
        let range = GpaRange::try_new(Gpa::new(request.address), request.size).map_err(|_| Errno::INVAL)?;
        let first = range.start().frame();
        let pages = first..Gfn::new(first.number() + range.pages());
        let kind = if request.attributes == 0 { Kind::Shared } else { Kind::Private };
        let _changing = self.slots.lock();
        if !self.attributes.all_are(&pages, kind) {
            self.invalidate([pages.clone()], || self.attributes.set(&pages, kind));
        }
        Ok(())
    }
}
