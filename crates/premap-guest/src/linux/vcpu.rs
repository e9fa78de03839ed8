//! A vCPU on `/dev/kvm` that runs the guest's code.

use std::sync::Arc;

use kvm_bindings::KVM_EXIT_UNKNOWN;
use kvm_ioctls::{VcpuExit, VcpuFd};
use premap_address::{Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};
use premap_softkvm::MemoryFault;

use super::control::{Control, ENTRY};
use super::mode::{self, Abilities};
use super::{Borrowable, code, errno, private};
use crate::error::GuestError;
use crate::machine::Guest;
use crate::mode::Mode;
use crate::touch::{Access, Slice};

/// A vCPU on `/dev/kvm`.
#[derive(Debug)]
pub struct LinuxVcpu {
    // Dropped in this order, as in `LinuxVm`.
    fd: Borrowable<VcpuFd>,
    control: Arc<Control>,
    abilities: Abilities,
    mode: Mode,
    memory_fault: Option<MemoryFault>,
}

impl LinuxVcpu {
    pub(super) fn new(fd: VcpuFd, control: Arc<Control>, abilities: Abilities) -> Self {
        Self { fd: Borrowable(fd), control, abilities, mode: Mode::default(), memory_fault: None }
    }
}

impl Vcpu for LinuxVcpu {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        // The ioctl says what it lacked in the vCPU's shared page alone, which may hold the last run's exit.
        self.fd.0.get_kvm_run().exit_reason = KVM_EXIT_UNKNOWN;
        let result = premap_kvm::linux::Vcpu::new(&self.fd).pre_fault_memory(range);
        self.memory_fault = private::left_in(self.fd.0.get_kvm_run());
        result
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        premap_kvm::linux::Vcpu::new(&self.fd).renew_root()
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        premap_kvm::linux::Vcpu::new(&self.fd).stats()
    }
}

impl Guest for LinuxVcpu {
    fn enter(&mut self, mode: Mode) -> Result<(), GuestError> {
        mode::change(&self.fd.0, self.abilities, self.mode, mode)?;
        self.mode = mode;
        Ok(())
    }

    fn prepare(&mut self, slice: &Slice) -> Result<(), GuestError> {
        let Ok(range) = GpaRange::try_new(slice.gpa, slice.pages * PAGE_SIZE) else {
            return Ok(());
        };
        if self.mode == Mode::PagingOff {
            // Without paging an address has 32 bits, and measured memory starts above those.
            return Err(GuestError::OutOfReach(range));
        }
        self.control.map(range)?;
        let fd = &self.fd.0;
        mode::set_registers(fd, self.mode)?;
        fd.set_regs(&code::registers(slice, ENTRY)).map_err(failed("KVM_SET_REGS"))
    }

    fn run(&mut self) -> Result<u64, GuestError> {
        self.memory_fault = None;
        loop {
            match self.fd.0.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(exit) => {
                    let error = unexpected(exit);
                    self.memory_fault = private::left_in(self.fd.0.get_kvm_run());
                    self.finish_pending_access();
                    return Err(error);
                }
                Err(error) if errno(error) == Errno::INTR => {}
                Err(error) => return Err(failed("KVM_RUN")(error)),
            }
        }
        Ok(self.fd.0.get_regs().map_err(failed("KVM_GET_REGS"))?.rax)
    }

    fn memory_fault(&self) -> Option<MemoryFault> {
        self.memory_fault
    }

    fn map_own_memory(&mut self, range: GpaRange) -> Result<(), GuestError> {
        let own = self.control.map(range)?;
        let mut left =
            kvm_pre_fault_memory { gpa: own.start().raw(), size: own.bytes(), ..Default::default() };
        // A KVM that can't do it leaves these few pages to faults.
        while left.size > 0 && self.pre_fault_memory(&mut left).is_ok() {}
        Ok(())
    }
}

impl LinuxVcpu {
    /// Lets KVM finish an access that it left to user space, without a further step of the guest: else the next guest
    /// would begin with it.
    fn finish_pending_access(&mut self) {
        self.fd.0.set_kvm_immediate_exit(1);
        // EINTR is what an immediate exit gives; the guest is being given up with a better error than any other.
        let _ = self.fd.0.run();
        self.fd.0.set_kvm_immediate_exit(0);
    }
}

pub(super) fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    move |error| GuestError::Call { call, errno: errno(error) }
}

fn unexpected(exit: VcpuExit<'_>) -> GuestError {
    match exit {
        VcpuExit::MmioRead(gpa, _) => GuestError::Mmio { gpa: Gpa::new(gpa), access: Access::Read },
        VcpuExit::MmioWrite(gpa, _) => GuestError::Mmio { gpa: Gpa::new(gpa), access: Access::Write },
        VcpuExit::MemoryFault { gpa, size, flags } => {
            GuestError::MemoryFault { gpa: Gpa::new(gpa), bytes: size, private: private::is_private(flags) }
        }
        VcpuExit::Shutdown => GuestError::Exit { reason: "KVM_EXIT_SHUTDOWN, a triple fault".into() },
        VcpuExit::FailEntry(reason, cpu) => GuestError::Exit {
            reason: format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on CPU {cpu}"),
        },
        VcpuExit::InternalError => GuestError::Exit { reason: "KVM_EXIT_INTERNAL_ERROR".into() },
        other => GuestError::Exit { reason: format!("{other:?}") },
    }
}
