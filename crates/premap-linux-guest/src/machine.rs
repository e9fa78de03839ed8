//! The machine: made, lent to an engine, booted.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};
use premap::{Region, Touch};
use premap_guest::{Backing, Borrowable, Cost, Linux, MappedPages};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu, linux};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{LinuxGuestError, kvm};
use crate::image::Image;
use crate::layout::ACPI;
use crate::ports::{Interrupt, Ports, SERIAL_IRQ};
use crate::ram::Ram;
use crate::vcpu::{self, End, Until, lock};
use crate::{acpi, cpu, load};

/// How many vCPUs the machine's ACPI tables can name, and its interrupt controllers tell apart.
pub const MAX_VCPUS: u32 = 254;

/// What a machine is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its memory.
    pub bytes: u64,
    /// What that is made of.
    pub backing: Backing,
    /// How many vCPUs the guest has, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// How many more there are that never run, and that the guest is not told of. With the guest's, at most [`MAX_VCPUS`].
    pub spares: u32,
}

/// A machine with a kernel in its memory, ready to run.
#[derive(Debug)]
pub struct LinuxMachine {
    // Dropped in this order: the memory outlives the VM, which lives as long as its vCPUs. A spare that was taken holds it
    // too.
    vcpus: Vec<Borrowable<VcpuFd>>,
    spares: Vec<Spare>,
    vm: Borrowable<VmFd>,
    ram: Arc<Ram>,
    ports: Arc<Mutex<Ports>>,
}

/// A vCPU that never runs. The machine's memory lives as long as it does.
#[derive(Debug)]
pub struct Spare {
    // Dropped in this order.
    vcpu: linux::Vcpu<Borrowable<VcpuFd>>,
    _ram: Arc<Ram>,
}

impl Vcpu for Spare {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        self.vcpu.pre_fault_memory(range)
    }

    fn renew_root(&mut self) -> Result<(), Errno> {
        self.vcpu.renew_root()
    }

    fn stats(&self) -> Result<Stats, Errno> {
        self.vcpu.stats()
    }
}

/// A machine's parts, lent together.
#[derive(Debug)]
pub struct Lent<'a> {
    /// The VM.
    pub vm: linux::Vm<&'a Borrowable<VmFd>>,
    /// Its vCPUs.
    pub vcpus: Vec<linux::Vcpu<&'a Borrowable<VcpuFd>>>,
}

/// What a boot came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// How it ended.
    pub end: End,
    /// From before the first entry into the guest to the end.
    pub elapsed: Duration,
    /// What KVM counted, over all vCPUs.
    pub cost: Cost,
}

impl LinuxMachine {
    /// Makes a machine and loads the image. Of the memory only what the image fills is present on the host.
    ///
    /// # Errors
    /// An image that does not fit the memory, or what the kernel gives.
    pub fn new(linux: &Linux, image: &Image, shape: &Shape) -> Result<Self, LinuxGuestError> {
        let all = shape.vcpus.saturating_add(shape.spares);
        let counts = (u8::try_from(shape.vcpus), u8::try_from(all));
        let (Ok(count), Ok(all)) = counts else { return Err(LinuxGuestError::Vcpus(all)) };
        if count == 0 || u32::from(all) > MAX_VCPUS {
            return Err(LinuxGuestError::Vcpus(all.into()));
        }
        let ram = Arc::new(Ram::new(shape.bytes, shape.backing)?);
        let entry = load::load(image, &ram)?;
        ram.with(|memory| {
            cpu::write_tables(memory)?;
            load::write(memory, ACPI, &acpi::tables(count))
        })?;

        let vm = linux.bare_vm()?;
        vm.0.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.0.create_pit2(timer).map_err(kvm("KVM_CREATE_PIT2"))?;
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|error| {
            LinuxGuestError::Os { what: "eventfd", errno: Errno::from_io_error(&error).unwrap_or(Errno::IO) }
        })?;
        vm.0.register_irqfd(&interrupt, SERIAL_IRQ).map_err(kvm("KVM_IRQFD"))?;
        let cpuid = cpu::cpuid(linux.kvm())?;
        let (mut vcpus, mut spares) = (Vec::new(), Vec::new());
        for id in 0..all {
            let fd = vm.0.create_vcpu(id.into()).map_err(kvm("KVM_CREATE_VCPU"))?;
            cpu::set_cpuid(&fd, &cpuid, id, count)?;
            if id == 0 {
                cpu::enter(&fd, entry)?;
            }
            if id < count {
                vcpus.push(Borrowable(fd));
            } else {
                spares.push(Spare { vcpu: linux::Vcpu::new(Borrowable(fd)), _ram: Arc::clone(&ram) });
            }
        }
        let ports = Arc::new(Mutex::new(Ports::new(Interrupt(interrupt))));
        let machine = Self { vcpus, spares, vm, ram, ports };
        machine.tell_memory()?;
        Ok(machine)
    }

    /// The memory as an engine wants it described.
    #[must_use]
    pub fn regions(&self, touch: Touch) -> Vec<Region> {
        self.ram.regions(touch)
    }

    /// VM and vCPUs, for an engine to work with.
    pub fn lend(&mut self) -> Lent<'_> {
        Lent { vm: linux::Vm::new(&self.vm), vcpus: self.vcpus.iter().map(linux::Vcpu::new).collect() }
    }

    /// The spare vCPUs, for an engine to keep while the guest runs.
    pub fn take_spares(&mut self) -> Vec<Spare> {
        std::mem::take(&mut self.spares)
    }

    /// Runs the guest up to its end, a thread a vCPU. The process's first real-time signal is taken for calling them back.
    ///
    /// # Errors
    /// A vCPU that leaves the guest for a reason that this machine has no answer to, or a KVM without statistics.
    pub fn boot(&mut self, until: &Until) -> Result<Boot, LinuxGuestError> {
        lock(&self.ports).console_mut().look_for(until.marker.as_deref().unwrap_or_default());
        let before = self.cost()?;
        let (end, elapsed) = vcpu::run(&mut self.vcpus, &self.ports, until.limit)?;
        let after = self.cost()?;
        let cost = Cost { faults: after.faults - before.faults, exits: after.exits - before.exits };
        Ok(Boot { end, elapsed, cost })
    }

    /// What the guest has written to its console so far.
    #[must_use]
    pub fn console(&self) -> String {
        lock(&self.ports).console().text()
    }

    /// What the VM has mapped at the second stage.
    ///
    /// # Errors
    /// A KVM without these statistics.
    pub fn mapped(&self) -> Result<MappedPages, LinuxGuestError> {
        Ok(MappedPages::of(&linux::Vm::new(&self.vm))?)
    }

    fn cost(&self) -> Result<Cost, LinuxGuestError> {
        let mut sum = Cost::default();
        for vcpu in &self.vcpus {
            let one = Cost::of(&linux::Vcpu::new(vcpu))?;
            sum = Cost { faults: sum.faults + one.faults, exits: sum.exits + one.exits };
        }
        Ok(sum)
    }

    // UNSAFETY: hands the memory to the VM; what makes it safe is the order of this struct's fields.
    #[expect(unsafe_code, reason = "calls Ram::tell, whose contract the struct keeps")]
    fn tell_memory(&self) -> Result<(), LinuxGuestError> {
        // SAFETY: `vm` and `vcpus` are dropped before `ram`, and are never given away: what is lent borrows them, and lets
        // nobody run a vCPU. `boot`'s threads are joined before it returns, and a spare holds `ram` itself.
        unsafe { self.ram.tell(&linux::Vm::new(&self.vm)) }
    }
}
