//! A virtual CPU: the guest's accesses, its root, its statistics.

mod fault;
mod mode;
mod prefault;
mod roots;

use std::sync::{Arc, PoisonError};

use premap_address::{Gfn, Gpa, PageSize};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Stats, Vcpu};

use crate::access::{Operation, perform};
use crate::config::PhysicalBits;
use crate::host::{Getter, Run, State};
use crate::loaded::Loaded;
use crate::machine::Machine;
use crate::memslots::Slot;
use crate::mode::CpuMode;
use crate::private::{Held, Kind, MemoryFault};
use crate::stats::VcpuCounters;
use crate::tdx::{SHARED_BIT, TdCpu};
use fault::Outcome;
use roots::RootCache;

/// A virtual CPU of a [`SoftVm`](crate::SoftVm). Many may run and pre-fault at the same time, each on a thread of its own.
#[derive(Debug)]
pub struct SoftVcpu {
    /// What the TDX module has of it, in a TD. It goes before the machine, with which the TD goes.
    pub(crate) td: Option<TdCpu>,
    pub(crate) machine: Arc<Machine>,
    id: u32,
    mode: CpuMode,
    /// How many bits of physical address its guest was told of.
    told: PhysicalBits,
    roots: RootCache,
    pub(crate) counters: VcpuCounters,
    /// The host's last answer, kept for its allocation.
    runs: Vec<Run>,
    /// Gets pages for pre-faults.
    getter: Getter,
    /// What `kvm_run` says of the last access that could not be served.
    memory_fault: Option<MemoryFault>,
    /// The page that this vCPU's write replaced by a copy just now.
    copied: Option<Gfn>,
}

/// Why a guest's access did not reach memory: what `KVM_RUN` comes back with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    /// No memslot holds the address: `KVM_EXIT_MMIO`.
    #[error("no memory at {gpa}: the VMM emulates the access")]
    Mmio {
        /// The guest-physical address.
        gpa: Gpa,
    },
    /// A write to a read-only memslot: `KVM_EXIT_MMIO` too.
    #[error("read-only memory at {gpa}: the VMM emulates the write")]
    ReadOnly {
        /// The guest-physical address.
        gpa: Gpa,
    },
    /// The tables that are shadowed do not translate the access: the guest gets a page fault of its own, or its hypervisor
    /// one of the nested tables.
    #[error("the guest's own tables do not permit the access to {address}")]
    Guest {
        /// The address under those tables.
        address: Gpa,
    },
    /// `KVM_RUN` fails: EFAULT where the host has no memory behind the slot, EIO where the VM is dead.
    #[error("the guest can't go on at {gpa}: {errno}")]
    Failed {
        /// The address.
        gpa: Gpa,
        /// What `KVM_RUN` gives.
        errno: Errno,
    },
    /// The address is not a multiple of 8. Guests here touch aligned words only.
    #[error("{gpa} is not the address of an aligned word")]
    Unaligned {
        /// The address.
        gpa: Gpa,
    },
}

impl SoftVcpu {
    pub(crate) fn new(machine: Arc<Machine>, id: u32) -> Self {
        let (mode, told) = (CpuMode::default(), machine.config.physical_bits);
        let key = machine.root_key(mode, told).expect("every VM has the mode of a reset");
        Self {
            machine,
            id,
            mode,
            told,
            roots: RootCache::new(key),
            counters: VcpuCounters::default(),
            runs: Vec::new(),
            getter: Getter::default(),
            td: None,
            memory_fault: None,
            copied: None,
        }
    }

    /// The number that it was created with.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// `kvm_run.memory_fault`: what the last call, the guest's touch or a pre-fault, wanted and could not have
    /// ([`KVM_EXIT_MEMORY_FAULT`]). A pre-fault that got some way before it says so too, though it succeeds.
    ///
    /// [`KVM_EXIT_MEMORY_FAULT`]: kvm_bindings::KVM_EXIT_MEMORY_FAULT
    #[must_use]
    pub fn memory_fault(&self) -> Option<MemoryFault> {
        self.memory_fault
    }

    /// The guest reads the word at `gpa`: a guest-physical address, or one under the tables that are shadowed
    /// ([`CpuMode`]).
    ///
    /// # Errors
    /// There is no memory to read, or it is not an aligned word.
    pub fn read(&mut self, gpa: Gpa) -> Result<u64, GuestFault> {
        self.access(gpa, Operation::Load)
    }

    /// The guest writes the word at `gpa`: an address as for [`read`](Self::read).
    ///
    /// # Errors
    /// There is no memory to write, or it is not an aligned word.
    pub fn write(&mut self, gpa: Gpa, value: u64) -> Result<(), GuestFault> {
        self.access(gpa, Operation::Store(value)).map(drop)
    }

    /// Runs the guest's instruction, again after each fault, until it is done or leaves to the VMM.
    fn access(&mut self, gpa: Gpa, operation: Operation) -> Result<u64, GuestFault> {
        if !gpa.raw().is_multiple_of(8) {
            return Err(GuestFault::Unaligned { gpa });
        }
        if let Some(td) = &self.machine.td
            && gpa.raw() >> SHARED_BIT == 0
        {
            if !td.is_runnable() {
                return Err(GuestFault::Failed { gpa, errno: Errno::INVAL });
            }
            let write = if let Operation::Store(value) = operation { Some(value) } else { None };
            return self.access_private(gpa, write);
        }
        self.clear_memory_fault();
        loop {
            // KVM_RUN frees obsolete roots and loads the current one before it enters the guest.
            self.roots.let_go_of_obsolete();
            let failed = |errno| GuestFault::Failed { gpa, errno };
            if self.roots.current().is_none() {
                self.load_root().map_err(failed)?;
            }
            if self.machine.is_dead() {
                return Err(failed(Errno::IO));
            }
            if let Some(root) = self.roots.current()
                && let Some(value) = perform(&self.machine, root, gpa, operation)
            {
                return Ok(value);
            }
            self.counters.exits += 1;
            match self.fault(gpa, operation) {
                Ok(Outcome::Fixed | Outcome::Spurious) => {}
                Ok(Outcome::Retry) => std::thread::yield_now(),
                Ok(Outcome::Written) => return Ok(operation.stored()),
                Ok(Outcome::Emulate(gpa)) => return Err(GuestFault::Mmio { gpa }),
                Ok(Outcome::EmulateWrite(gpa)) => return Err(GuestFault::ReadOnly { gpa }),
                Ok(Outcome::Guest) => return Err(GuestFault::Guest { address: gpa }),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Leaves to the VMM because of a page that is not there as it is wanted.
    pub(crate) fn exit_for<T>(&mut self, gfn: Gfn, kind: Kind, errno: Errno) -> Result<T, Errno> {
        self.memory_fault = Some(MemoryFault::new(gfn, kind));
        Err(errno)
    }

    /// The guest goes on: what `kvm_run` said is no more.
    pub(crate) fn clear_memory_fault(&mut self) {
        self.memory_fault = None;
    }

    /// The private memory behind pages of a slot: where it lies, present, as `kvm_gmem_get_pfn` gives it.
    fn get_private(&mut self, slot: &Slot, gfn: Gfn, pages: u64) -> Result<(Run, Held), Errno> {
        let got = match &slot.private {
            None => Err(Errno::FAULT),
            Some(private) => private.get(gfn.number() - slot.base.number(), pages),
        };
        match got {
            Ok((start, held)) => {
                // Linux maps a guest_memfd by small pages only.
                Ok((Run { start, pages, state: State::Writable, size: PageSize::Size4K }, held))
            }
            Err(errno) => self.exit_for(gfn, Kind::Private, errno),
        }
    }

    /// The vCPU's root, taken if it has none.
    fn load_root(&mut self) -> Result<Loaded, Errno> {
        if let Some(root) = self.roots.current() {
            return Ok(root.clone());
        }
        let root = self.machine.load(self.roots.key())?;
        self.roots.load(root.clone());
        Ok(root)
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.machine.vcpus.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Vcpu for SoftVcpu {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        self.clear_memory_fault();
        self.pre_fault(range)
    }

    fn renew_root(&mut self) -> Result<(), Errno> {
        self.roots.let_go();
        Ok(())
    }

    fn stats(&self) -> Result<Stats, Errno> {
        Ok(self.counters.export())
    }
}
