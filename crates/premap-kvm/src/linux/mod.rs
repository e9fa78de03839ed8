//! The traits on Linux's KVM: any file descriptor is enough.
// UNSAFETY: ioctls. Each block argues that the request number and the type behind its pointer belong together, and that
// the kernel writes nowhere else.
#![expect(unsafe_code, reason = "ioctls on KVM descriptors")]

mod tdx;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Getter, Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl};

use crate::abi::{
    self, kvm_dirty_log, kvm_enable_cap, kvm_pre_fault_memory, kvm_sregs, kvm_userspace_memory_region,
};
use crate::{Errno, Result, Stats};

/// A virtual machine's descriptor, owned or borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Vm<F>(F);

/// CR0.WP. KVM gives a vCPU's root up whenever the bit changes.
const CR0_WP: u64 = 1 << 16;

/// A virtual CPU's descriptor, owned or borrowed.
#[derive(Clone, Copy, Debug)]
pub struct Vcpu<F>(F);

impl<F: AsFd> Vm<F> {
    /// Wraps what `KVM_CREATE_VM` gave. Another kind of descriptor is told by ENOTTY at the first call.
    pub const fn new(fd: F) -> Self {
        Self(fd)
    }
}

impl<F: AsFd> Vcpu<F> {
    /// Wraps what `KVM_CREATE_VCPU` gave. Another kind of descriptor is told by ENOTTY at the first call.
    pub const fn new(fd: F) -> Self {
        Self(fd)
    }
}

impl<F: AsFd> Vcpu<F> {
    fn set_sregs(&self, sregs: kvm_sregs) -> Result<()> {
        // SAFETY: KVM_SET_SREGS reads one kvm_sregs and changes the vCPU's registers only.
        unsafe { ioctl(&self.0, Setter::<{ abi::KVM_SET_SREGS }, _>::new(sregs)) }
    }
}

impl<F: AsFd> crate::Vm for Vm<F> {
    fn check_extension(&self, capability: u32) -> Result<u32> {
        // SAFETY: KVM_CHECK_EXTENSION takes an integer, reads and writes no memory, and gives a number.
        unsafe { ioctl(&self.0, ByValue::<{ abi::KVM_CHECK_EXTENSION }>(capability)) }
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        // SAFETY: KVM_ENABLE_CAP reads one kvm_enable_cap; the capabilities that premap uses hold no pointers.
        unsafe { ioctl(&self.0, Setter::<{ abi::KVM_ENABLE_CAP }, _>::new(*cap)) }
    }

    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: KVM_SET_USER_MEMORY_REGION reads one kvm_userspace_memory_region. That the memory which it names may
        // be handed to a guest is this method's own contract.
        unsafe { ioctl(&self.0, Setter::<{ abi::KVM_SET_USER_MEMORY_REGION }, _>::new(*region)) }
    }

    unsafe fn get_dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> Result<()> {
        let log = kvm_dirty_log { slot, padding: 0, dirty_bitmap: bitmap.as_mut_ptr() as u64 };
        // SAFETY: KVM_GET_DIRTY_LOG reads one kvm_dirty_log and writes a bit for each page of the slot behind its
        // pointer; that `bitmap` has room for them is this method's own contract.
        unsafe { ioctl(&self.0, Setter::<{ abi::KVM_GET_DIRTY_LOG }, _>::new(log)) }
    }

    fn stats(&self) -> Result<Stats> {
        read_stats(&self.0)
    }
}

impl<F: AsFd> crate::Vcpu for Vcpu<F> {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
        // SAFETY: KVM_PRE_FAULT_MEMORY reads and writes one kvm_pre_fault_memory. It maps what the VM's memslots hold
        // already, as a read by the guest would, and changes no content.
        unsafe { ioctl(&self.0, Updater::<{ abi::KVM_PRE_FAULT_MEMORY }, _>::new(range)) }
    }

    fn renew_root(&mut self) -> Result<()> {
        // SAFETY: KVM_GET_SREGS writes one kvm_sregs, for which the getter has room.
        let sregs = unsafe { ioctl(&self.0, Getter::<{ abi::KVM_GET_SREGS }, kvm_sregs>::new()) }?;
        self.set_sregs(kvm_sregs { cr0: sregs.cr0 ^ CR0_WP, ..sregs })?;
        self.set_sregs(sregs)
    }

    fn stats(&self) -> Result<Stats> {
        read_stats(&self.0)
    }
}

/// Some hundred statistics make some ten KiB; a descriptor that is something else is not read on.
const LONGEST_STATS: u64 = 1 << 20;

/// Reads the statistics of a VM or a vCPU, to the end of their file.
fn read_stats(fd: &impl AsFd) -> Result<Stats> {
    // SAFETY: KVM_GET_STATS_FD takes no argument and gives a new descriptor.
    let number = unsafe { ioctl(fd, ByValue::<{ abi::KVM_GET_STATS_FD }>(0)) }?;
    let number = i32::try_from(number).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
    let mut bytes = Vec::new();
    file.take(LONGEST_STATS)
        .read_to_end(&mut bytes)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Stats::parse(&bytes).map_err(|_| Errno::PROTO)
}

/// An ioctl whose argument is a number and whose result is its return value.
struct ByValue<const OPCODE: Opcode>(u32);

// SAFETY: the opcode and the argument go to the kernel as they are, no memory is behind the argument, and the output is
// the return value alone.
unsafe impl<const OPCODE: Opcode> Ioctl for ByValue<OPCODE> {
    type Output = u32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut std::ffi::c_void) -> Result<u32> {
        u32::try_from(output).map_err(|_| Errno::RANGE)
    }
}
