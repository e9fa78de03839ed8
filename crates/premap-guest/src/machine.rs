//! A machine: a VM, its vCPUs and its memory, the same on every kernel.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use premap_address::{GpaRange, Hva};
use premap_kvm::{Stats, Vcpu, Vm};
use premap_softkvm::MemoryFault;

use crate::error::{GuestError, MachineError, call};
use crate::mode::Mode;
use crate::private::{PrivateMemory, VmType};
use crate::slots::{Slot, SlotId, Slots, give_back};
use crate::threads::together;
use crate::touch::{Slice, Touch};

/// A KVM on which machines are made.
pub trait Kernel {
    /// What users call it.
    const NAME: &'static str;

    /// Its virtual machines.
    type Vm: MachineVm;
    /// Their virtual CPUs.
    type Vcpu: Guest + Send;

    /// Makes a VM without memory, of the usual type.
    ///
    /// # Errors
    /// What the kernel gives.
    fn create_vm(&self) -> Result<Self::Vm, MachineError> {
        self.create_vm_of(VmType::Default)
    }

    /// Makes a VM of a type, without memory.
    ///
    /// # Errors
    /// A type that this kernel lacks, or what the kernel gives.
    fn create_vm_of(&self, vm_type: VmType) -> Result<Self::Vm, MachineError>;

    /// Whether it has VMs of a type.
    fn has(&self, vm_type: VmType) -> bool;

    /// Makes a vCPU that is ready to run a guest.
    ///
    /// # Errors
    /// What the kernel gives.
    fn create_vcpu(&self, vm: &Self::Vm, id: u32) -> Result<Self::Vcpu, MachineError>;

    /// Which kernel this is: a release, or the profile that the software KVM follows.
    fn release(&self) -> String;
}

/// A VM whose memory the host may change under it.
pub trait MachineVm: PrivateMemory + Sync {
    /// Runs `change`, which makes `memory` inaccessible or gives its pages back, in a way that this KVM learns of it.
    fn change_host_memory<R>(&self, memory: &Range<Hva>, change: impl FnOnce() -> R) -> R;

    /// Runs `touch`, which reads, writes or populates `memory` and so may break copy-on-write, in a way that this KVM
    /// learns of it.
    fn touch_host_memory<R>(&self, memory: &Range<Hva>, touch: impl FnOnce() -> R) -> R;
}

/// A vCPU whose guest touches memory.
pub trait Guest: Vcpu {
    /// Puts the vCPU into a mode, in which it pre-faults and touches memory from here on. A fresh one is in
    /// [`Mode::Paging`].
    ///
    /// # Errors
    /// The mode can't be had here, or what the kernel gives.
    fn enter(&mut self, mode: Mode) -> Result<(), GuestError>;

    /// Gets the vCPU ready to run `slice`, so that [`run`](Self::run) is the guest's time alone.
    ///
    /// # Errors
    /// A slice that the guest can't reach, or what the kernel gives.
    fn prepare(&mut self, slice: &Slice) -> Result<(), GuestError>;

    /// Runs what was prepared to its end, and gives the sum of all words read, modulo 2^64 (0 if it writes).
    ///
    /// # Errors
    /// Where the guest leaves for another reason than its end.
    fn run(&mut self) -> Result<u64, GuestError>;

    /// `kvm_run.memory_fault`: which page the last call, a run of the guest or a pre-fault, could not have
    /// (`KVM_EXIT_MEMORY_FAULT`). A pre-fault that got some way before says it too, though it succeeds.
    fn memory_fault(&self) -> Option<MemoryFault>;

    /// Maps at the second stage what a guest that touches `range` is itself made of, code and page tables, as far as
    /// this KVM can: then the faults of a run are those of the memory touched.
    ///
    /// # Errors
    /// A range that the guest can't reach.
    fn map_own_memory(&mut self, range: GpaRange) -> Result<(), GuestError>;
}

/// A VM, its vCPUs and its memory.
#[derive(Debug)]
pub struct Machine<K: Kernel> {
    vcpus: Vec<K::Vcpu>,
    spares: Vec<K::Vcpu>,
    vm: K::Vm,
    slots: BTreeMap<SlotId, Slot>,
}

impl<K: Kernel> Drop for Machine<K> {
    fn drop(&mut self) {
        for (id, slot) in std::mem::take(&mut self.slots) {
            give_back(&self.vm, [id.number()], slot.into_memory());
        }
    }
}

/// A machine's parts, lent together.
#[derive(Debug)]
pub struct Lent<'a, K: Kernel> {
    /// The VM.
    pub vm: &'a K::Vm,
    /// Its vCPUs.
    pub vcpus: &'a mut [K::Vcpu],
    /// Those that the guest never hears of.
    pub spares: &'a mut [K::Vcpu],
    /// Its slots.
    pub slots: Slots<'a, K::Vm>,
}

/// What a touch cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// From the first vCPU's entry to the last one's end.
    pub elapsed: Duration,
    /// Page faults that KVM took for the guest (`pf_taken`), over all vCPUs.
    pub faults: u64,
    /// Exits from the guest (`exits`), over all vCPUs.
    pub exits: u64,
    /// The sum of all words read, modulo 2^64.
    pub sum: u64,
}

/// How many second-stage mappings of each size a VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedPages {
    /// Of 4 KiB.
    pub pages_4k: u64,
    /// Of 2 MiB.
    pub pages_2m: u64,
    /// Of 1 GiB.
    pub pages_1g: u64,
}

impl<K: Kernel> Machine<K> {
    /// Makes a machine with so many vCPUs and no memory.
    ///
    /// # Errors
    /// What the kernel gives.
    pub fn new(kernel: &K, vcpus: u32) -> Result<Self, MachineError> {
        Self::with_spares(kernel, vcpus, 0)
    }

    /// The same with so many vCPUs more that no guest runs on, to map memory while it runs on the others.
    ///
    /// # Errors
    /// What the kernel gives.
    pub fn with_spares(kernel: &K, vcpus: u32, spares: u32) -> Result<Self, MachineError> {
        Self::around(kernel.create_vm()?, kernel, vcpus, spares)
    }

    /// Makes a machine of a type, with so many vCPUs and no memory.
    ///
    /// # Errors
    /// A type that this kernel lacks, or what the kernel gives.
    pub fn of_type(kernel: &K, vm_type: VmType, vcpus: u32) -> Result<Self, MachineError> {
        Self::around(kernel.create_vm_of(vm_type)?, kernel, vcpus, 0)
    }

    fn around(vm: K::Vm, kernel: &K, vcpus: u32, spares: u32) -> Result<Self, MachineError> {
        let create = |ids: Range<u32>| ids.map(|id| kernel.create_vcpu(&vm, id)).collect::<Result<_, _>>();
        let (vcpus, spares) = (create(0..vcpus)?, create(vcpus..vcpus.saturating_add(spares))?);
        Ok(Self { vcpus, spares, vm, slots: BTreeMap::new() })
    }

    /// The VM.
    pub fn vm(&self) -> &K::Vm {
        &self.vm
    }

    /// The slots, to add, change and remove.
    pub fn slots(&mut self) -> Slots<'_, K::Vm> {
        Slots::new(&self.vm, &mut self.slots)
    }

    /// A slot.
    pub fn slot(&self, id: SlotId) -> Option<&Slot> {
        self.slots.get(&id)
    }

    /// All parts at once, for an engine to work with.
    pub fn lend(&mut self) -> Lent<'_, K> {
        Lent {
            vm: &self.vm,
            vcpus: &mut self.vcpus,
            spares: &mut self.spares,
            slots: Slots::new(&self.vm, &mut self.slots),
        }
    }

    /// Calls [`Guest::map_own_memory`] on the first vCPU.
    ///
    /// # Errors
    /// A range that the guest can't reach.
    pub fn map_own_memory(&mut self, range: GpaRange) -> Result<(), MachineError> {
        let mapped = self.vcpus.first_mut().map_or(Ok(()), |vcpu| vcpu.map_own_memory(range));
        mapped.map_err(|error| MachineError::Guest { vcpu: 0, error })
    }

    /// Touches the pages on all vCPUs at once, as [`Touch::run`] does.
    ///
    /// # Errors
    /// The first vCPU's error, if any; all have ended then. A thread that the host does not give; none has begun then.
    ///
    /// # Panics
    /// If a vCPU's thread panicked.
    pub fn touch(&mut self, touch: &Touch) -> Result<Run, MachineError> {
        touch.run(&mut self.vcpus)
    }

    /// What the VM has mapped at the second stage.
    ///
    /// # Errors
    /// A KVM without these statistics.
    pub fn mapped(&self) -> Result<MappedPages, MachineError> {
        MappedPages::of(&self.vm)
    }
}

impl MappedPages {
    /// What a VM has mapped at the second stage.
    ///
    /// # Errors
    /// A KVM without these statistics.
    pub fn of(vm: &impl Vm) -> Result<Self, MachineError> {
        let stats = vm.stats().map_err(call("KVM_GET_STATS_FD of the VM"))?;
        Ok(Self {
            pages_4k: statistic(&stats, "pages_4k")?,
            pages_2m: statistic(&stats, "pages_2m")?,
            pages_1g: statistic(&stats, "pages_1g")?,
        })
    }
}

impl Touch {
    /// Touches the pages on these vCPUs at once, a slice each.
    ///
    /// # Errors
    /// The first vCPU's error, if any; all have ended then. A thread that the host does not give; none has begun then.
    ///
    /// # Panics
    /// If a vCPU's thread panicked.
    pub fn run<G: Guest + Send>(&self, vcpus: &mut [G]) -> Result<Run, MachineError> {
        let slices: Vec<_> = self.slices(vcpus.len()).collect();
        let mut before = Vec::new();
        for (index, (vcpu, slice)) in vcpus.iter_mut().zip(&slices).enumerate() {
            vcpu.prepare(slice).map_err(|error| MachineError::Guest { vcpu: index, error })?;
            before.push(Cost::of(vcpu)?);
        }
        let times = run_all(vcpus, &slices)?;
        let (mut first, mut last, mut sum) = (None, None, 0_u64);
        for (vcpu, (start, end, result)) in times.into_iter().enumerate() {
            sum = sum.wrapping_add(result.map_err(|error| MachineError::Guest { vcpu, error })?);
            first = first.into_iter().chain([start]).min();
            last = last.into_iter().chain([end]).max();
        }
        let (mut faults, mut exits) = (0, 0);
        for (vcpu, before) in vcpus.iter().zip(before) {
            let after = Cost::of(vcpu)?;
            faults += after.faults - before.faults;
            exits += after.exits - before.exits;
        }
        let elapsed = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
        Ok(Run { elapsed, faults, exits, sum })
    }
}

/// A vCPU's entry, its end, and what it came to.
type Timed = (Instant, Instant, Result<u64, GuestError>);

/// Runs each vCPU that has pages on a thread of its own, all released at once.
fn run_all<G: Guest + Send>(vcpus: &mut [G], slices: &[Slice]) -> Result<Vec<Timed>, MachineError> {
    let busy = vcpus.iter_mut().zip(slices).filter(|(_, slice)| slice.pages > 0).map(|(vcpu, _)| vcpu);
    together(busy.collect(), |vcpu: &mut G| {
        let start = Instant::now();
        let result = vcpu.run();
        (start, Instant::now(), result)
    })
}

/// What KVM has counted for a vCPU so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Page faults that it took for the guest (`pf_taken`).
    pub faults: u64,
    /// Exits from the guest (`exits`).
    pub exits: u64,
}

impl Cost {
    /// What KVM has counted for a vCPU.
    ///
    /// # Errors
    /// A KVM without these statistics.
    pub fn of(vcpu: &impl Vcpu) -> Result<Self, MachineError> {
        let stats = vcpu.stats().map_err(call("KVM_GET_STATS_FD of a vCPU"))?;
        Ok(Self { faults: statistic(&stats, "pf_taken")?, exits: statistic(&stats, "exits")? })
    }
}

fn statistic(stats: &Stats, name: &'static str) -> Result<u64, MachineError> {
    stats.get(name).ok_or(MachineError::NoStatistic(name))
}
