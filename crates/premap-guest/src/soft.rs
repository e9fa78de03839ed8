//! Machines on the software KVM: the same touches, each an access that walks the VM's table.

use std::ops::Range;

use premap_address::{GpaRange, Hva, PAGE_SIZE};
use premap_kvm::abi::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use premap_softkvm::{GuestFault, MemoryFault, Profile, SoftConfig, SoftVcpu, SoftVm};
use rustix::fs::FallocateFlags;

use crate::error::{GuestError, MachineError, call};
use crate::machine::{Guest, Kernel, MachineVm};
use crate::mode::Mode;
use crate::private::{FileOperation, GuestMemfd, PrivateMemory, VmType};
use crate::touch::{Access, Slice, word_of};

/// The software KVM, as one release of Linux.
#[derive(Clone, Copy, Debug)]
pub struct Soft {
    config: SoftConfig,
}

impl Soft {
    /// Takes a profile, with two-dimensional paging.
    #[must_use]
    pub fn new(profile: Profile) -> Self {
        Self::with_config(SoftConfig { profile, ..SoftConfig::default() })
    }

    /// Takes all that can be chosen.
    #[must_use]
    pub const fn with_config(config: SoftConfig) -> Self {
        Self { config }
    }
}

impl Kernel for Soft {
    const NAME: &'static str = "soft";

    type Vm = SoftVm;
    type Vcpu = SoftGuest;

    fn create_vm(&self) -> Result<SoftVm, MachineError> {
        SoftVm::new(self.config).map_err(call("making a software VM"))
    }

    fn create_vm_of(&self, vm_type: VmType) -> Result<SoftVm, MachineError> {
        let vm_type = match vm_type {
            VmType::Default => premap_softkvm::VmType::Default,
            VmType::SoftwareProtected => premap_softkvm::VmType::SoftwareProtected,
        };
        SoftVm::new(SoftConfig { vm_type, ..self.config }).map_err(call("making a software VM"))
    }

    fn has(&self, _: VmType) -> bool {
        true
    }

    fn create_vcpu(&self, vm: &SoftVm, id: u32) -> Result<SoftGuest, MachineError> {
        let vcpu = vm.create_vcpu(id).map_err(call("making a software vCPU"))?;
        Ok(SoftGuest { vcpu, slice: None })
    }

    fn release(&self) -> String {
        self.config.profile.to_string()
    }
}

impl MachineVm for SoftVm {
    /// No kernel tells a user-space KVM, so it is told here.
    fn change_host_memory<R>(&self, memory: &Range<Hva>, change: impl FnOnce() -> R) -> R {
        let notifier = self.notifier();
        notifier.observe(memory, || notifier.invalidate(memory, change))
    }

    fn touch_host_memory<R>(&self, memory: &Range<Hva>, touch: impl FnOnce() -> R) -> R {
        self.notifier().observe(memory, touch)
    }
}

// UNSAFETY: an unsafe method passed through.
#[expect(unsafe_code, reason = "the trait's method is unsafe to call")]
impl PrivateMemory for SoftVm {
    type GuestMemfd = premap_softkvm::GuestMemfd;

    fn create_guest_memfd(
        &self,
        request: &kvm_create_guest_memfd,
    ) -> premap_kvm::Result<premap_softkvm::GuestMemfd> {
        self.create_guest_memfd(request)
    }

    unsafe fn set_user_memory_region2(
        &self,
        region: &kvm_userspace_memory_region2,
    ) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.set_user_memory_region2(region) }
    }

    fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> premap_kvm::Result<()> {
        self.set_memory_attributes(request)
    }
}

impl GuestMemfd for premap_softkvm::GuestMemfd {
    fn number(&self) -> u32 {
        self.number()
    }

    fn inode(&self) -> premap_kvm::Result<u64> {
        self.inode()
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> premap_kvm::Result<()> {
        self.fallocate(mode, offset, bytes)
    }

    /// The file operations that a guest_memfd lacks, each with the errno that Linux has for a file without it.
    fn attempt(&self, operation: FileOperation) -> premap_kvm::Result<()> {
        Err(match operation {
            FileOperation::Read | FileOperation::Write | FileOperation::Truncate => premap_kvm::Errno::INVAL,
            FileOperation::Map => premap_kvm::Errno::NODEV,
        })
    }
}

/// A software vCPU with the guest that it is to run.
#[derive(Debug)]
pub struct SoftGuest {
    vcpu: SoftVcpu,
    slice: Option<Slice>,
}

impl premap_kvm::Vcpu for SoftGuest {
    fn pre_fault_memory(
        &mut self,
        range: &mut premap_kvm::abi::kvm_pre_fault_memory,
    ) -> premap_kvm::Result<()> {
        self.vcpu.pre_fault_memory(range)
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        self.vcpu.renew_root()
    }

    fn stats(&self) -> premap_kvm::Result<premap_kvm::Stats> {
        self.vcpu.stats()
    }
}

impl Guest for SoftGuest {
    fn enter(&mut self, mode: Mode) -> Result<(), GuestError> {
        match mode {
            Mode::Paging => Ok(()),
            mode => Err(GuestError::NoMode { mode, why: "not made yet" }),
        }
    }

    fn prepare(&mut self, slice: &Slice) -> Result<(), GuestError> {
        self.slice = Some(*slice);
        Ok(())
    }

    fn run(&mut self) -> Result<u64, GuestError> {
        let Some(slice) = self.slice.take() else {
            return Ok(0);
        };
        let mut sum = 0_u64;
        for page in slice.pages() {
            let gpa = slice.gpa.wrapping_add(page * PAGE_SIZE);
            let done = match slice.access {
                Access::Read => self.vcpu.read(gpa),
                Access::Write => self.vcpu.write(gpa, word_of(slice.first + page)).map(|()| 0),
            };
            let done = done.map_err(|fault| as_linux_tells(fault, self.memory_fault(), slice.access));
            sum = sum.wrapping_add(done?);
        }
        Ok(sum)
    }

    fn memory_fault(&self) -> Option<MemoryFault> {
        self.vcpu.memory_fault()
    }

    /// This guest has neither code nor tables in guest memory.
    fn map_own_memory(&mut self, _: GpaRange) -> Result<(), GuestError> {
        Ok(())
    }
}

/// The same error that a guest on `/dev/kvm` comes back with.
fn as_linux_tells(fault: GuestFault, wanted: Option<MemoryFault>, access: Access) -> GuestError {
    if let (GuestFault::Failed { .. }, Some(MemoryFault { range, private })) = (fault, wanted) {
        return GuestError::MemoryFault { gpa: range.start(), bytes: range.bytes(), private };
    }
    match fault {
        GuestFault::Mmio { gpa } | GuestFault::ReadOnly { gpa } => GuestError::Mmio { gpa, access },
        GuestFault::Failed { errno, .. } => GuestError::Call { call: "KVM_RUN", errno },
        other @ GuestFault::Unaligned { .. } => GuestError::Exit { reason: other.to_string() },
    }
}
