//! Machines on the software KVM: the same touches, each an access that walks the VM's table.
//!
//! Its guest is no code, and where the second stage is two-dimensional it needs no page tables either. Where tables are
//! shadowed, it has the control slot that guests on `/dev/kvm` have, made when it is first needed.

mod private;
mod tables;

use std::ops::Range;
use std::sync::Arc;

use premap_address::{Gpa, GpaRange, Hva, PAGE_SIZE};
use premap_kvm::Errno;
use premap_softkvm::{CpuMode, GuestFault, MemoryFault, Profile, SoftConfig, SoftVcpu, SoftVm, Tdp};

use crate::error::{GuestError, MachineError, call};
use crate::linux::control::{NESTED_PML4, PML4};
use crate::machine::{Guest, Kernel, MachineVm};
use crate::mode::Mode;
use crate::private::VmType;
use crate::touch::{Access, Slice, word_of};
use tables::Tables;

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

    type Vm = SoftMachineVm;
    type Vcpu = SoftGuest;

    fn create_vm(&self) -> Result<SoftMachineVm, MachineError> {
        SoftMachineVm::new(self.config)
    }

    fn create_vm_of(&self, vm_type: VmType) -> Result<SoftMachineVm, MachineError> {
        let vm_type = match vm_type {
            VmType::Default => premap_softkvm::VmType::Default,
            VmType::SoftwareProtected => premap_softkvm::VmType::SoftwareProtected,
        };
        SoftMachineVm::new(SoftConfig { vm_type, ..self.config })
    }

    fn has(&self, _: VmType) -> bool {
        true
    }

    fn create_vcpu(&self, vm: &SoftMachineVm, id: u32) -> Result<SoftGuest, MachineError> {
        let vcpu = vm.vm.create_vcpu(id).map_err(call("making a software vCPU"))?;
        let tables = Arc::clone(&vm.tables);
        let mut guest = SoftGuest { vcpu, tdp: self.config.tdp, mode: Mode::PagingOff, tables, slice: None };
        guest.enter(Mode::default()).map_err(|error| MachineError::Guest { vcpu: 0, error })?;
        Ok(guest)
    }

    fn release(&self) -> String {
        self.config.profile.to_string()
    }
}

/// A VM of the software KVM, and the tables that its guests may need.
#[derive(Debug)]
pub struct SoftMachineVm {
    tables: Arc<Tables>,
    vm: SoftVm,
}

impl SoftMachineVm {
    fn new(config: SoftConfig) -> Result<Self, MachineError> {
        let vm = SoftVm::new(config).map_err(call("making a software VM, which needs /proc,"))?;
        Ok(Self { tables: Arc::new(Tables::new(vm.clone())), vm })
    }

    /// The VM itself, for what only a software KVM can be asked.
    #[must_use]
    pub fn soft(&self) -> &SoftVm {
        &self.vm
    }
}

// UNSAFETY: unsafe methods passed through.
#[expect(unsafe_code, reason = "the trait's methods are unsafe to call")]
impl premap_kvm::Vm for SoftMachineVm {
    fn check_extension(&self, capability: u32) -> premap_kvm::Result<u32> {
        self.vm.check_extension(capability)
    }

    fn enable_cap(&self, cap: &premap_kvm::abi::kvm_enable_cap) -> premap_kvm::Result<()> {
        self.vm.enable_cap(cap)
    }

    unsafe fn set_user_memory_region(
        &self,
        region: &premap_kvm::abi::kvm_userspace_memory_region,
    ) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    unsafe fn get_dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> premap_kvm::Result<()> {
        // SAFETY: the same contract.
        unsafe { self.vm.get_dirty_log(slot, bitmap) }
    }

    fn stats(&self) -> premap_kvm::Result<premap_kvm::Stats> {
        premap_kvm::Vm::stats(&self.vm)
    }
}

impl MachineVm for SoftMachineVm {
    /// No kernel tells a user-space KVM, so it is told here.
    fn change_host_memory<R>(&self, memory: &Range<Hva>, change: impl FnOnce() -> R) -> R {
        let notifier = self.vm.notifier();
        notifier.observe(memory, || notifier.invalidate(memory, change))
    }

    fn touch_host_memory<R>(&self, memory: &Range<Hva>, touch: impl FnOnce() -> R) -> R {
        self.vm.notifier().observe(memory, touch)
    }
}

/// A software vCPU with the guest that it is to run.
#[derive(Debug)]
pub struct SoftGuest {
    // Dropped in this order: the tables outlive who walks them.
    vcpu: SoftVcpu,
    tdp: Tdp,
    mode: Mode,
    tables: Arc<Tables>,
    slice: Option<Slice>,
}

impl SoftGuest {
    /// The vCPU itself, for what only a software KVM can be asked.
    pub fn soft(&mut self) -> &mut SoftVcpu {
        &mut self.vcpu
    }

    /// Whether the tables that this mode runs under are shadowed.
    fn is_shadowed(&self, mode: Mode) -> bool {
        match mode {
            Mode::PagingOff => false,
            Mode::NestedPaging => true,
            Mode::Paging | Mode::SystemManagement | Mode::NestedShadow => self.tdp == Tdp::Off,
        }
    }
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
        if self.is_shadowed(mode) {
            self.tables.show(u32::from(mode == Mode::SystemManagement))?;
        }
        // All of them map every address to itself.
        let table = Gpa::new(PML4);
        let state = match mode {
            Mode::Paging => CpuMode::Paging { cr3: table },
            Mode::PagingOff => CpuMode::PagingOff,
            Mode::SystemManagement => CpuMode::SystemManagement { cr3: Some(table) },
            Mode::NestedPaging => CpuMode::NestedPaging { ncr3: Gpa::new(NESTED_PML4) },
            Mode::NestedShadow => CpuMode::NestedShadow { cr3: table },
        };
        self.vcpu.enter(state).map_err(|errno| match (mode, errno) {
            (Mode::NestedPaging, Errno::INVAL) => {
                GuestError::NoMode { mode, why: "it has no two-dimensional paging to offer" }
            }
            _ => GuestError::Call { call: "entering a mode", errno },
        })?;
        self.mode = mode;
        Ok(())
    }

    fn prepare(&mut self, slice: &Slice) -> Result<(), GuestError> {
        if self.is_shadowed(self.mode)
            && let Ok(range) = GpaRange::try_new(slice.gpa, slice.pages * PAGE_SIZE)
        {
            self.tables.map(range)?;
        }
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

    /// This guest has no code in guest memory, and its tables, if any, are walked by the KVM and not through it.
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
        GuestFault::Guest { address } => {
            GuestError::Exit { reason: format!("a page fault of its own at {address}") }
        }
        other @ GuestFault::Unaligned { .. } => GuestError::Exit { reason: other.to_string() },
    }
}
