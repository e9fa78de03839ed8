//! A virtual machine: what `KVM_CREATE_VM` makes, and the ioctls on it.

mod capabilities;
mod ioctls;
mod logging;
mod private;
mod slots;

use std::sync::{Arc, PoisonError};

use premap_kvm::Errno;

use crate::config::{SoftConfig, VmType};
use crate::machine::Machine;
use crate::notifier::Notifier;
use crate::profile::Building;
use crate::tdx::TdxHost;
use crate::vcpu::SoftVcpu;

/// A VM of the software KVM. Clones are the same VM, as duplicated descriptors are.
///
/// # What it asks of the VMM
///
/// Guests read and write memory at the addresses that [`set_user_memory_region`](premap_kvm::Vm::set_user_memory_region)
/// gave. What that method's safety section says holds here as on Linux, and one thing more, since no kernel can tell a
/// user-space KVM: **memory of a slot may be unmapped, made inaccessible or cut off (a hole punched, a file shortened) only
/// under an invalidation of its [`notifier`](Self::notifier)**, or after the slot is deleted, or when no vCPU runs any
/// more. Memory that was never there, or went before the guest could have it mapped, is fine: a touch gives EFAULT.
///
/// ```
/// use premap_address::Gpa;
/// use premap_kvm::Vcpu;
/// use premap_kvm::abi::kvm_pre_fault_memory;
/// use premap_softkvm::{SoftConfig, SoftVm};
///
/// let vm = SoftVm::new(SoftConfig::default())?;
/// let mut vcpu = vm.create_vcpu(0)?;
/// // No memslot yet, so there is nothing to map.
/// let mut range = kvm_pre_fault_memory { gpa: 0, size: 4096, ..Default::default() };
/// assert_eq!(vcpu.pre_fault_memory(&mut range), Err(premap_kvm::Errno::NOENT));
/// assert!(vcpu.read(Gpa::new(0)).is_err());
/// # Ok::<(), premap_kvm::Errno>(())
/// ```
#[derive(Clone, Debug)]
pub struct SoftVm {
    machine: Arc<Machine>,
}

/// The most vCPUs that a VM can have, and one more than the highest number of one: x86's `KVM_MAX_VCPUS` and
/// `KVM_MAX_VCPU_IDS`.
const MOST_VCPUS: u32 = 4096;
const VCPU_IDS: u32 = 4 * MOST_VCPUS;
/// The memory of the machine that a TD is on where none is given.
const TD_MEMORY: u64 = 64 << 30;

impl SoftVm {
    /// Makes a VM without memory and vCPUs.
    ///
    /// # Errors
    /// `/proc/self/pagemap` and `/proc/self/maps`, by which it sees the host's side of memory, can't be opened.
    ///
    /// EINVAL: a TD, on a kernel without TDX.
    pub fn new(config: SoftConfig) -> Result<Self, Errno> {
        if config.vm_type == VmType::Tdx {
            return Self::on_tdx_host(config, &TdxHost::new(TD_MEMORY)?);
        }
        Ok(Self { machine: Arc::new(Machine::new(config, None)?) })
    }

    /// Makes a TD on a machine that others may be on as well.
    ///
    /// # Errors
    /// EINVAL: the type of the VM is another, or the kernel has no TDX; and those of [`new`](Self::new).
    pub fn on_tdx_host(config: SoftConfig, host: &Arc<TdxHost>) -> Result<Self, Errno> {
        if config.vm_type != VmType::Tdx || config.profile.rules().building == Building::NoTdx {
            return Err(Errno::INVAL);
        }
        Ok(Self { machine: Arc::new(Machine::new(config, Some(Arc::clone(host)))?) })
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> SoftConfig {
        self.machine.config
    }

    /// Makes a virtual CPU: `KVM_CREATE_VCPU`.
    ///
    /// # Errors
    /// EEXIST: there is one of this number. EINVAL: the number is too high, or there are too many. EIO: the VM is dead, or
    /// a TD that is not initialised.
    pub fn create_vcpu(&self, id: u32) -> Result<SoftVcpu, Errno> {
        self.machine.check_alive()?;
        if self.machine.td.as_ref().is_some_and(|td| !td.is_initialised()) {
            return Err(Errno::IO);
        }
        let mut vcpus = self.machine.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        if id >= VCPU_IDS || vcpus.len() >= MOST_VCPUS as usize {
            return Err(Errno::INVAL);
        }
        if !vcpus.insert(id) {
            return Err(Errno::EXIST);
        }
        Ok(SoftVcpu::new(Arc::clone(&self.machine), id))
    }

    /// Where the VMM says that it is about to change memory behind a slot.
    #[must_use]
    pub fn notifier(&self) -> Notifier<'_> {
        Notifier::new(&self.machine)
    }

    /// `KVM_SET_NR_MMU_PAGES`: permits so many shadow pages from here on, where the limit else follows the slots (one for 50
    /// pages of guest memory, 64 at least). Those over the limit go, the oldest first, with what they map; roots in use stay.
    /// The TDP MMU knows no limit.
    ///
    /// # Errors
    /// EINVAL: fewer than 64. EIO: the VM is dead.
    pub fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Errno> {
        self.machine.check_alive()?;
        self.machine.set_page_limit(pages)
    }

    /// A test hook: the host is short of memory, and its shrinker asks this VM for `pages` shadow pages. Returns how many went;
    /// none where KVM has no shrinker, from 6.13 on, and none of the TDP MMU's tables ever.
    pub fn shrink_mmu(&self, pages: u64) -> u64 {
        self.machine.shrink(pages)
    }

    /// A test hook: kills the VM, as KVM does when it finds a bug of its own (`KVM_BUG_ON`). Every ioctl gives EIO from
    /// here on.
    pub fn kill(&self) {
        self.machine.kill();
    }
}

#[cfg(test)]
mod tests;
