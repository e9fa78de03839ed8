//! TDX on Linux's KVM.
// UNSAFETY: one ioctl whose struct points to another. Each caller argues what lies behind the pointer.
#![expect(unsafe_code, reason = "an ioctl on KVM descriptors")]

use std::os::fd::AsFd;
use std::ptr;

use rustix::ioctl::{Updater, ioctl};

use super::{Vcpu, Vm};
use crate::abi;
use crate::tdx::{
    MOST_CPUID_ENTRIES, TdVcpu, TdVm, TdxCommand, TdxError, kvm_tdx_capabilities, kvm_tdx_cmd,
    kvm_tdx_init_mem_region, kvm_tdx_init_vm, tdx_cpuid,
};

/// Runs a command.
///
/// # Safety
/// `data` is what the command takes: a number, or the address of its struct, valid for reads and for the writes that the
/// kernel makes of it.
unsafe fn command(fd: &impl AsFd, command: TdxCommand, flags: u32, data: u64) -> Result<(), TdxError> {
    let mut cmd = kvm_tdx_cmd { id: command as u32, flags, data, hw_error: 0 };
    // SAFETY: KVM_MEMORY_ENCRYPT_OP on a TD reads and writes one kvm_tdx_cmd, and what lies behind its `data` as the
    // caller promises. On any other VM it is EINVAL or ENOTTY, or a command of SEV whose struct begins likewise and which
    // refuses a descriptor of 0 where it has one.
    let done = unsafe { ioctl(fd, Updater::<{ abi::KVM_MEMORY_ENCRYPT_OP }, _>::new(&mut cmd)) };
    done.map_err(|errno| TdxError { errno, hw_error: cmd.hw_error })
}

impl<F: AsFd> TdVm for Vm<F> {
    fn tdx_capabilities(&self) -> Result<Box<kvm_tdx_capabilities>, TdxError> {
        let mut capabilities = Box::<kvm_tdx_capabilities>::default();
        capabilities.cpuid.nent = u32::try_from(MOST_CPUID_ENTRIES).unwrap_or(u32::MAX);
        let data = ptr::from_mut(&mut *capabilities).expose_provenance() as u64;
        // SAFETY: the struct is writable, and has room for as many leaves as it says.
        unsafe { command(&self.0, TdxCommand::Capabilities, 0, data) }?;
        Ok(capabilities)
    }

    fn tdx_init_vm(&self, init: &kvm_tdx_init_vm) -> Result<(), TdxError> {
        // SAFETY: the command reads the struct and as many leaves as it says; more than there is room for are refused here.
        unsafe {
            if init.cpuid.nent as usize > MOST_CPUID_ENTRIES {
                return Err(crate::Errno::TOOBIG.into());
            }
            command(&self.0, TdxCommand::InitVm, 0, ptr::from_ref(init).expose_provenance() as u64)
        }
    }

    fn tdx_finalize_vm(&self) -> Result<(), TdxError> {
        // SAFETY: the command takes no data.
        unsafe { command(&self.0, TdxCommand::FinalizeVm, 0, 0) }
    }
}

impl<F: AsFd> TdVcpu for Vcpu<F> {
    fn tdx_init_vcpu(&mut self, rcx: u64) -> Result<(), TdxError> {
        // SAFETY: the data is a number.
        unsafe { command(&self.0, TdxCommand::InitVcpu, 0, rcx) }
    }

    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        flags: u32,
    ) -> Result<(), TdxError> {
        let data = ptr::from_mut(region).expose_provenance() as u64;
        // SAFETY: the struct is writable. What lies at its source address is read by the kernel, which tells by EFAULT
        // where nothing does.
        unsafe { command(&self.0, TdxCommand::InitMemRegion, flags, data) }
    }

    fn tdx_get_cpuid(&mut self, cpuid: &mut tdx_cpuid) -> Result<(), TdxError> {
        cpuid.nent = cpuid.nent.min(u32::try_from(MOST_CPUID_ENTRIES).unwrap_or(u32::MAX));
        let data = ptr::from_mut(cpuid).expose_provenance() as u64;
        // SAFETY: the struct is writable, and has room for as many leaves as it says.
        unsafe { command(&self.0, TdxCommand::GetCpuid, 0, data) }
    }
}
