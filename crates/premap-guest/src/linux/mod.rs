//! Machines on `/dev/kvm`.
//!
//! The VM has a *control slot* at gpa 0 besides the machine's own slots: the guest's code and its page tables. Measured
//! memory starts at 4 GiB, above KVM's own pages and the hole for devices. Where there is system management mode, its
//! address space has the control slot too.

mod code;
pub(crate) mod control;
mod mode;
mod nested;
mod private;
mod vcpu;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES, KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
};
use kvm_ioctls::{Kvm, VmFd};
use premap_address::Hva;
use premap_kvm::abi::{kvm_enable_cap, kvm_userspace_memory_region};
use premap_kvm::{Errno, Stats, Vm as _};

use crate::error::{MachineError, call};
use crate::machine::{Kernel, MachineVm};
use crate::private::VmType;
use control::Control;
pub use control::enter_long_mode;
use mode::Abilities;
pub use private::LinuxGuestMemfd;
pub use vcpu::LinuxVcpu;

const PATH: &str = "/dev/kvm";

/// Where KVM keeps its own three pages for real mode on Intel CPUs without unrestricted guests.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Linux's KVM, behind an open `/dev/kvm`.
#[derive(Debug)]
pub struct Linux {
    kvm: Kvm,
}

impl Linux {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// The errno of opening it.
    pub fn open() -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(|error| MachineError::Open { path: PATH, errno: errno(error) })?;
        Ok(Self { kvm })
    }

    /// What was opened, for questions that machines don't ask.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Makes a VM without slots or vCPUs, whose addresses from 3 GiB to 4 GiB KVM may use for itself.
    ///
    /// # Errors
    /// What the kernel gives.
    pub fn bare_vm(&self) -> Result<Borrowable<VmFd>, MachineError> {
        self.bare_vm_of(VmType::Default)
    }

    fn bare_vm_of(&self, vm_type: VmType) -> Result<Borrowable<VmFd>, MachineError> {
        if !self.has(vm_type) {
            return Err(MachineError::NoVmType(vm_type));
        }
        let fd = loop {
            match self.kvm.create_vm_with_type(number(vm_type).into()).map_err(errno) {
                Err(Errno::INTR) => {}
                made => break made.map_err(call("KVM_CREATE_VM"))?,
            }
        };
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(errno)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS).map_err(errno).map_err(call("KVM_SET_TSS_ADDR"))?;
        Ok(Borrowable(fd))
    }
}

impl Kernel for Linux {
    const NAME: &'static str = "kvm";

    type Vm = LinuxVm;
    type Vcpu = LinuxVcpu;

    fn create_vm_of(&self, vm_type: VmType) -> Result<LinuxVm, MachineError> {
        let vm = LinuxVm { fd: self.bare_vm_of(vm_type)?, control: Arc::new(Control::new()?) };
        // A KVM without the capability says 0, and has one.
        let spaces = vm.check_extension(KVM_CAP_MULTI_ADDRESS_SPACE).map_err(call("KVM_CHECK_EXTENSION"))?;
        for space in 0..spaces.max(1) {
            vm.control.add_to(&vm, space)?;
        }
        Ok(vm)
    }

    fn has(&self, vm_type: VmType) -> bool {
        // Kernels from before there were types give 0, and have default VMs.
        let types = self.kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
        vm_type == VmType::Default || types >> number(vm_type) & 1 == 1
    }

    fn create_vcpu(&self, vm: &LinuxVm, id: u32) -> Result<LinuxVcpu, MachineError> {
        let fd = vm.fd.0.create_vcpu(id.into()).map_err(errno).map_err(call("KVM_CREATE_VCPU"))?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(errno)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(errno).map_err(call("KVM_SET_CPUID2"))?;
        Ok(LinuxVcpu::new(fd, Arc::clone(&vm.control), Abilities::of(&self.kvm, &cpuid)))
    }

    fn release(&self) -> String {
        rustix::system::uname().release().to_string_lossy().into_owned()
    }
}

/// What `KVM_CREATE_VM` calls a type.
fn number(vm_type: VmType) -> u32 {
    match vm_type {
        VmType::Default => KVM_X86_DEFAULT_VM,
        VmType::SoftwareProtected => KVM_X86_SW_PROTECTED_VM,
    }
}

/// A VM on `/dev/kvm`.
#[derive(Debug)]
pub struct LinuxVm {
    // Dropped in this order: the control slot's memory outlives the VM. The vCPUs, which keep the VM alive, hold it too.
    fd: Borrowable<VmFd>,
    control: Arc<Control>,
}

impl LinuxVm {
    fn abi(&self) -> premap_kvm::linux::Vm<&Borrowable<VmFd>> {
        premap_kvm::linux::Vm::new(&self.fd)
    }
}

impl AsFd for LinuxVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// UNSAFETY: unsafe methods passed through, and a descriptor borrowed from its owner.
#[expect(unsafe_code, reason = "the trait's methods are unsafe to call")]
impl premap_kvm::Vm for LinuxVm {
    fn check_extension(&self, capability: u32) -> premap_kvm::Result<u32> {
        self.abi().check_extension(capability)
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> premap_kvm::Result<()> {
        self.abi().enable_cap(cap)
    }

    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.abi().set_user_memory_region(region) }
    }

    unsafe fn get_dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.abi().get_dirty_log(slot, bitmap) }
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        self.abi().stats()
    }
}

impl MachineVm for LinuxVm {
    /// Linux tells its KVM by itself, through the MMU notifier.
    fn change_host_memory<R>(&self, _: &Range<Hva>, change: impl FnOnce() -> R) -> R {
        change()
    }

    fn touch_host_memory<R>(&self, _: &Range<Hva>, touch: impl FnOnce() -> R) -> R {
        touch()
    }
}

/// A descriptor's owner that, as kvm-ioctls' types do, only gives its number.
#[derive(Debug)]
pub struct Borrowable<T>(pub T);

#[expect(unsafe_code, reason = "borrows the owner's descriptor")]
impl<T: AsRawFd> AsFd for Borrowable<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the owner is borrowed for as long as what is given, so the descriptor stays open.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// The errno in kvm-ioctls' error.
#[must_use]
pub fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_io_error(&io::Error::from_raw_os_error(error.errno())).unwrap_or(Errno::IO)
}
