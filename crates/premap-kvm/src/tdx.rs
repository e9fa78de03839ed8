//! TDX: what KVM does for a TD, on any KVM that has it (Linux 6.16 and later, or a software one).
//!
//! Each method is one command of `KVM_MEMORY_ENCRYPT_OP`, its struct in and out. Source of numbers, layouts and errors:
//! `arch/x86/include/uapi/asm/kvm.h` and Linux' documentation of Intel TDX.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

use crate::{Errno, Vcpu, Vm};

/// Bit 0 of the flags of [`TdVcpu::tdx_init_mem_region`]: pages are measured as they are added.
pub const KVM_TDX_MEASURE_MEMORY_REGION: u32 = 1 << 0;

/// The commands of `KVM_MEMORY_ENCRYPT_OP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TdxCommand {
    /// `KVM_TDX_CAPABILITIES`, on a VM.
    Capabilities = 0,
    /// `KVM_TDX_INIT_VM`, on a VM.
    InitVm = 1,
    /// `KVM_TDX_INIT_VCPU`, on a vCPU.
    InitVcpu = 2,
    /// `KVM_TDX_INIT_MEM_REGION`, on a vCPU.
    InitMemRegion = 3,
    /// `KVM_TDX_FINALIZE_VM`, on a VM.
    FinalizeVm = 4,
    /// `KVM_TDX_GET_CPUID`, on a vCPU.
    GetCpuid = 5,
}

/// What `KVM_MEMORY_ENCRYPT_OP` takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_tdx_cmd {
    /// A [`TdxCommand`].
    pub id: u32,
    /// The command's own; 0 for most.
    pub flags: u32,
    /// The command's own: a number, or the address of its struct.
    pub data: u64,
    /// 0 on entry; the TDX module's status where it failed.
    pub hw_error: u64,
}

/// How many CPUID leaves KVM takes at most: `KVM_MAX_CPUID_ENTRIES`.
pub const MOST_CPUID_ENTRIES: usize = 256;

/// `struct kvm_cpuid2` with room for as many leaves as KVM takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct tdx_cpuid {
    /// How many entries there are; on entry of a query, room for how many.
    pub nent: u32,
    /// Unused.
    pub padding: u32,
    /// The entries.
    pub entries: [kvm_cpuid_entry2; MOST_CPUID_ENTRIES],
}

impl Default for tdx_cpuid {
    fn default() -> Self {
        Self { nent: 0, padding: 0, entries: [kvm_cpuid_entry2::default(); MOST_CPUID_ENTRIES] }
    }
}

/// `struct kvm_tdx_capabilities`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvm_tdx_capabilities {
    /// TD attributes that a VM may have.
    pub supported_attrs: u64,
    /// XFAM bits that a VM may have.
    pub supported_xfam: u64,
    /// TDVMCALLs that the kernel and user space handle: bits of R11 and R12, kernel and user in turn.
    pub tdvmcallinfo: [u64; 4],
    /// Unused.
    pub reserved: [u64; 250],
    /// CPUID bits that a VM may have.
    pub cpuid: tdx_cpuid,
}

impl Default for kvm_tdx_capabilities {
    fn default() -> Self {
        Self {
            supported_attrs: 0,
            supported_xfam: 0,
            tdvmcallinfo: [0; 4],
            reserved: [0; 250],
            cpuid: tdx_cpuid::default(),
        }
    }
}

/// `struct kvm_tdx_init_vm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvm_tdx_init_vm {
    /// TD attributes.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// MRCONFIGID: 48 bytes.
    pub mrconfigid: [u64; 6],
    /// MROWNER: 48 bytes.
    pub mrowner: [u64; 6],
    /// MROWNERCONFIG: 48 bytes.
    pub mrownerconfig: [u64; 6],
    /// Zeroes.
    pub reserved: [u64; 12],
    /// CPUID as the TD sees it.
    pub cpuid: tdx_cpuid,
}

/// `struct kvm_tdx_init_mem_region`, advanced in place by what was done, also where it failed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_tdx_init_mem_region {
    /// Where the content lies in this process: 4 KiB-aligned.
    pub source_addr: u64,
    /// Where the guest sees it: 4 KiB-aligned, private.
    pub gpa: u64,
    /// How many pages of 4 KiB.
    pub nr_pages: u64,
}

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdxError {
    /// What the ioctl gave.
    pub errno: Errno,
    /// The TDX module's status, where it is the module that refused; else 0.
    pub hw_error: u64,
}

impl fmt::Display for TdxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hw_error {
            0 => write!(f, "{}", self.errno),
            status => write!(f, "{} (the TDX module says {status:#018x})", self.errno),
        }
    }
}

impl std::error::Error for TdxError {}

impl From<Errno> for TdxError {
    fn from(errno: Errno) -> Self {
        Self { errno, hw_error: 0 }
    }
}

/// A TD's virtual machine.
pub trait TdVm: Vm {
    /// `KVM_TDX_CAPABILITIES`.
    ///
    /// # Errors
    /// EINVAL: no TD, or flags. E2BIG: more CPUID leaves than there is room for.
    fn tdx_capabilities(&self) -> Result<Box<kvm_tdx_capabilities>, TdxError>;

    /// `KVM_TDX_INIT_VM`: creates the TD. Before the first vCPU.
    ///
    /// # Errors
    /// EINVAL: it is initialised already, reserved fields are not 0, or the module refuses an operand. E2BIG: too many
    /// CPUID leaves. EAGAIN: no entropy; try again. EIO: the module failed otherwise.
    fn tdx_init_vm(&self, init: &kvm_tdx_init_vm) -> Result<(), TdxError>;

    /// `KVM_TDX_FINALIZE_VM`: ends the building, and with it the measurement. From here on the TD can run.
    ///
    /// # Errors
    /// EINVAL: not ready, or finalized already. EBUSY: the module is busy. EIO.
    fn tdx_finalize_vm(&self) -> Result<(), TdxError>;
}

/// A TD's virtual CPU.
pub trait TdVcpu: Vcpu {
    /// `KVM_TDX_INIT_VCPU`: `rcx` is what the guest finds in RCX, the address of the TD HOB by convention.
    ///
    /// # Errors
    /// EINVAL: done already, or the VM is not initialised.
    fn tdx_init_vcpu(&mut self, rcx: u64) -> Result<(), TdxError>;

    /// `KVM_TDX_INIT_MEM_REGION`: adds pages to the TD, with the content at `source_addr`, and with
    /// [`KVM_TDX_MEASURE_MEMORY_REGION`] measures it. The region is advanced by what was done, also where it failed.
    ///
    /// # Errors
    /// EINVAL: the vCPU is not initialised, the TD is finalized, bad flags, an unaligned, empty or wrapping range, one that
    /// is not private, or has no guest_memfd. EFAULT or ENOMEM from the source. EBUSY: the module is busy. EINTR. EIO.
    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        flags: u32,
    ) -> Result<(), TdxError>;

    /// `KVM_TDX_GET_CPUID`: CPUID as the TD sees it. On entry `nent` says for how many leaves there is room, afterwards how many
    /// there are.
    ///
    /// # Errors
    /// E2BIG: there are more than there is room for; `nent` says how many. EINVAL: no TD, or not initialised.
    fn tdx_get_cpuid(&mut self, cpuid: &mut tdx_cpuid) -> Result<(), TdxError>;
}

impl<V: TdVcpu + ?Sized> TdVcpu for &mut V {
    fn tdx_init_vcpu(&mut self, rcx: u64) -> Result<(), TdxError> {
        (**self).tdx_init_vcpu(rcx)
    }

    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        flags: u32,
    ) -> Result<(), TdxError> {
        (**self).tdx_init_mem_region(region, flags)
    }

    fn tdx_get_cpuid(&mut self, cpuid: &mut tdx_cpuid) -> Result<(), TdxError> {
        (**self).tdx_get_cpuid(cpuid)
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_are_the_uapi_s() {
        assert_eq!(size_of::<kvm_tdx_cmd>(), 24);
        assert_eq!(
            [
                offset_of!(kvm_tdx_cmd, flags),
                offset_of!(kvm_tdx_cmd, data),
                offset_of!(kvm_tdx_cmd, hw_error)
            ],
            [4, 8, 16]
        );
        assert_eq!(offset_of!(kvm_tdx_capabilities, tdvmcallinfo), 16);
        assert_eq!(offset_of!(kvm_tdx_capabilities, cpuid), 2048);
        assert_eq!(
            [
                offset_of!(kvm_tdx_init_vm, xfam),
                offset_of!(kvm_tdx_init_vm, mrconfigid),
                offset_of!(kvm_tdx_init_vm, mrowner),
                offset_of!(kvm_tdx_init_vm, mrownerconfig),
                offset_of!(kvm_tdx_init_vm, reserved),
                offset_of!(kvm_tdx_init_vm, cpuid),
            ],
            [8, 16, 64, 112, 160, 256]
        );
        assert_eq!(offset_of!(tdx_cpuid, entries), 8);
        assert_eq!(size_of::<kvm_cpuid_entry2>(), 40);
        assert_eq!(
            [offset_of!(kvm_tdx_init_mem_region, gpa), offset_of!(kvm_tdx_init_mem_region, nr_pages)],
            [8, 16]
        );
        assert_eq!(size_of::<kvm_tdx_init_mem_region>(), 24);
    }

    #[test]
    fn an_error_says_what_the_module_said() {
        let error = TdxError { errno: Errno::IO, hw_error: 0xc000_0608_0000_0001 };
        assert!(error.to_string().contains("0xc000060800000001"), "{error}");
        assert!(!TdxError::from(Errno::BUSY).to_string().contains("0x"));
    }
}
