//! What the VM says it can do, and what can be switched.

use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_DESTROY_MEMORY_REGION_WORKS, KVM_CAP_DISABLE_QUIRKS,
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_ENABLE_CAP_VM, KVM_CAP_GUEST_MEMFD, KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
    KVM_CAP_MAX_VCPU_ID, KVM_CAP_MAX_VCPUS, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MEMORY_FAULT_INFO,
    KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_NR_MEMSLOTS, KVM_CAP_NR_VCPUS, KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_READONLY_MEM, KVM_CAP_SYNC_MMU, KVM_CAP_USER_MEMORY, KVM_CAP_USER_MEMORY2, KVM_CAP_VM_TYPES,
    KVM_X86_DEFAULT_VM, KVM_X86_QUIRK_SLOT_ZAP_ALL, KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM,
};
use premap_kvm::Errno;
use premap_kvm::abi::kvm_enable_cap;

use super::{MOST_VCPUS, VCPU_IDS};
use crate::config::VmType;
use crate::machine::Machine;
use crate::memslots::{ADDRESS_SPACES, USER_SLOTS};
use crate::profile::Building;

/// `KVM_CAP_VM_TYPES` of a kernel without TDX: default VMs and software-protected ones.
const VM_TYPES: u32 = 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_SW_PROTECTED_VM;

impl Machine {
    pub(super) fn capability(&self, capability: u32) -> u32 {
        match capability {
            KVM_CAP_PRE_FAULT_MEMORY => u32::from(self.has_tdp()),
            KVM_CAP_USER_MEMORY
            | KVM_CAP_SYNC_MMU
            | KVM_CAP_DESTROY_MEMORY_REGION_WORKS
            | KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
            | KVM_CAP_READONLY_MEM
            | KVM_CAP_ENABLE_CAP_VM
            | KVM_CAP_DISABLE_QUIRKS
            | KVM_CAP_BINARY_STATS_FD => 1,
            KVM_CAP_NR_MEMSLOTS => USER_SLOTS,
            KVM_CAP_MULTI_ADDRESS_SPACE => ADDRESS_SPACES,
            KVM_CAP_VM_TYPES => {
                VM_TYPES | u32::from(self.rules().building != Building::NoTdx) << KVM_X86_TDX_VM
            }
            KVM_CAP_USER_MEMORY2 | KVM_CAP_MEMORY_FAULT_INFO => 1,
            KVM_CAP_GUEST_MEMFD => u32::from(self.has_private_memory()),
            KVM_CAP_MEMORY_ATTRIBUTES => u32::try_from(self.supported_attributes()).unwrap_or(u32::MAX),
            KVM_CAP_NR_VCPUS => std::thread::available_parallelism()
                .ok()
                .and_then(|n| u32::try_from(n.get()).ok())
                .unwrap_or(1),
            KVM_CAP_MAX_VCPUS => MOST_VCPUS,
            KVM_CAP_MAX_VCPU_ID => VCPU_IDS,
            KVM_CAP_DISABLE_QUIRKS2 => u32::try_from(self.rules().quirks).unwrap_or(u32::MAX),
            _ => 0,
        }
    }

    pub(super) fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        let quirks = cap.args[0];
        match cap.cap {
            _ if cap.flags != 0 => Err(Errno::INVAL),
            KVM_CAP_DISABLE_QUIRKS2 if quirks & !self.rules().quirks != 0 => Err(Errno::INVAL),
            KVM_CAP_DISABLE_QUIRKS | KVM_CAP_DISABLE_QUIRKS2 => {
                self.disabled_quirks.fetch_or(quirks, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// Whether deleting or moving a slot takes every mapping away, as it does in a default VM unless the VMM says otherwise.
    pub(super) fn zaps_all(&self) -> bool {
        self.config.vm_type == VmType::Default
            && self.disabled_quirks.load(Ordering::Relaxed) & u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL) == 0
    }
}
