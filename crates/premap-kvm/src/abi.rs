//! The part of KVM's ABI that premap uses: kvm-bindings' structs, and the request numbers, which it lacks.
//!
//! Source of the numbers: `include/uapi/linux/kvm.h`.

pub use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_GUEST_MEMFD, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_VM_TYPES,
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_create_guest_memfd, kvm_enable_cap, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use rustix::ioctl::{Opcode, opcode};

/// KVM's ioctl group.
const KVMIO: u8 = 0xae;

/// `KVM_CHECK_EXTENSION`, on `/dev/kvm` or a VM.
pub const KVM_CHECK_EXTENSION: Opcode = opcode::none(KVMIO, 0x03);
/// `KVM_GET_DIRTY_LOG`, on a VM.
pub const KVM_GET_DIRTY_LOG: Opcode = opcode::write::<kvm_dirty_log>(KVMIO, 0x42);
/// `KVM_SET_USER_MEMORY_REGION`, on a VM.
pub const KVM_SET_USER_MEMORY_REGION: Opcode = opcode::write::<kvm_userspace_memory_region>(KVMIO, 0x46);
/// `KVM_ENABLE_CAP`, on a VM.
pub const KVM_ENABLE_CAP: Opcode = opcode::write::<kvm_enable_cap>(KVMIO, 0xa3);
/// `KVM_GET_REGS`, on a vCPU.
pub const KVM_GET_REGS: Opcode = opcode::read::<kvm_regs>(KVMIO, 0x81);
/// `KVM_GET_SREGS`, on a vCPU.
pub const KVM_GET_SREGS: Opcode = opcode::read::<kvm_sregs>(KVMIO, 0x83);
/// `KVM_SET_SREGS`, on a vCPU.
pub const KVM_SET_SREGS: Opcode = opcode::write::<kvm_sregs>(KVMIO, 0x84);
/// `KVM_MEMORY_ENCRYPT_OP`, on a VM or a vCPU.
pub const KVM_MEMORY_ENCRYPT_OP: Opcode = opcode::read_write::<u64>(KVMIO, 0xba);
/// `KVM_GET_STATS_FD`, on a VM or a vCPU; gives a descriptor.
pub const KVM_GET_STATS_FD: Opcode = opcode::none(KVMIO, 0xce);
/// `KVM_PRE_FAULT_MEMORY`, on a vCPU. A VMM's seccomp filter must allow this number, 0xc040aed5.
pub const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVMIO, 0xd5);

/// `struct kvm_dirty_log` with the user pointer as an integer, since kvm-bindings' union is awkward to build.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvm_dirty_log {
    /// The slot asked about: the id in bits 0 to 15, the address space above.
    pub slot: u32,
    /// Unused.
    pub padding: u32,
    /// Where the kernel writes a bit for each page of the slot, lowest page first.
    pub dirty_bitmap: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_uapi_s() {
        assert_eq!(KVM_CHECK_EXTENSION, 0xae03);
        assert_eq!(KVM_GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_aea3);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_GET_SREGS, 0x8138_ae83);
        assert_eq!(KVM_SET_SREGS, 0x4138_ae84);
        assert_eq!(KVM_MEMORY_ENCRYPT_OP, 0xc008_aeba);
        assert_eq!(KVM_GET_STATS_FD, 0xaece);
        assert_eq!(KVM_PRE_FAULT_MEMORY, 0xc040_aed5);
    }
}
