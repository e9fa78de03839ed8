//! A TD on the software KVM, and a guest that accepts its memory.
// UNSAFETY: KVM_SET_USER_MEMORY_REGION2. The machine owns the memory that it names, and frees it by way of `give_back`.
#![expect(unsafe_code, reason = "hands owned memory to KVM")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use premap_address::{GpaRange, PAGE_SIZE};
use premap_kvm::Vcpu;
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
    kvm_userspace_memory_region2,
};
use premap_kvm::tdx::{TdVm, TdxError, kvm_tdx_init_vm};
use premap_softkvm::tdx::{Accepted, TdxHost};
use premap_softkvm::{GuestFault, GuestMemfd, Profile, SoftConfig, SoftVcpu, SoftVm, VmType};

use crate::backing::Backing;
use crate::error::{GuestError, MachineError, call};
use crate::memory::Memory;
use crate::slots::give_back;
use crate::threads::together;

/// XFAM of the TD: x87 and SSE.
const XFAM: u64 = 3;

/// A TD with private memory and vCPUs, initialised and not launched.
#[derive(Debug)]
pub struct TdMachine {
    vcpus: Vec<SoftVcpu>,
    vm: SoftVm,
    private: Vec<GuestMemfd>,
    /// By the number of its slot.
    shared: Vec<Memory>,
    host: Arc<TdxHost>,
}

/// What the guest's ACCEPTs cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// From the first vCPU's entry to the last one's end.
    pub elapsed: Duration,
    /// Pages accepted.
    pub pages: u64,
    /// Pages that the TD had from its launch on.
    pub already: u64,
    /// Exits that an EPT violation caused, over all vCPUs.
    pub exits: u64,
}

impl Drop for TdMachine {
    fn drop(&mut self) {
        for (slot, memory) in (0..).zip(self.shared.drain(..)) {
            give_back(&self.vm, [slot], memory);
        }
    }
}

impl TdMachine {
    /// Makes a TD with so many vCPUs and this memory, all private, on a machine of its own.
    ///
    /// # Errors
    /// A profile without TDX, ranges that overlap, or memory that can't be had.
    pub fn new(profile: Profile, vcpus: u32, memory: &[GpaRange]) -> Result<Self, MachineError> {
        let bytes: u64 = memory.iter().map(|range| range.bytes()).sum();
        // Beside the guest's memory: tables, a page for 512, and control structures.
        let room = bytes + bytes / 128 + (64 << 20);
        let host =
            TdxHost::new(room.next_multiple_of(PAGE_SIZE)).map_err(call("making a machine with TDX"))?;
        let config = SoftConfig { profile, vm_type: VmType::Tdx, ..SoftConfig::default() };
        let vm = SoftVm::on_tdx_host(config, &host).map_err(call("making a TD"))?;
        let init = Box::new(kvm_tdx_init_vm { xfam: XFAM, ..Default::default() });
        vm.tdx_init_vm(&init).map_err(tdx("KVM_TDX_INIT_VM"))?;
        let mut machine = Self { vcpus: Vec::new(), vm, private: Vec::new(), shared: Vec::new(), host };
        let vm = &machine.vm;
        for (slot, range) in (0..).zip(memory) {
            let request = kvm_create_guest_memfd { size: range.bytes(), ..Default::default() };
            let file = vm.create_guest_memfd(&request).map_err(call("KVM_CREATE_GUEST_MEMFD"))?;
            let memory = Memory::new(range.bytes(), Backing::Anonymous)?;
            let region = kvm_userspace_memory_region2 {
                slot,
                flags: KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: range.start().raw(),
                memory_size: range.bytes(),
                userspace_addr: memory.hva().raw(),
                guest_memfd: file.number(),
                ..Default::default()
            };
            // SAFETY: the memory is ours, reached by nobody but the guest, and freed when its slot was deleted.
            unsafe { vm.set_user_memory_region2(&region) }.map_err(call("KVM_SET_USER_MEMORY_REGION2"))?;
            machine.shared.push(memory);
            let private_pages = kvm_memory_attributes {
                address: range.start().raw(),
                size: range.bytes(),
                attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
                flags: 0,
            };
            vm.set_memory_attributes(&private_pages).map_err(call("KVM_SET_MEMORY_ATTRIBUTES"))?;
            machine.private.push(file);
        }
        machine.vcpus = (0..vcpus)
            .map(|id| vm.create_vcpu(id).map_err(call("KVM_CREATE_VCPU")))
            .collect::<Result<_, _>>()?;
        Ok(machine)
    }

    /// The machine that it is on, whose SEAMCALLs are its own.
    #[must_use]
    pub fn host(&self) -> &TdxHost {
        &self.host
    }

    /// The VM and its vCPUs, for a launch.
    pub fn lend(&mut self) -> (&SoftVm, &mut [SoftVcpu]) {
        (&self.vm, &mut self.vcpus)
    }

    /// The measurement.
    ///
    /// # Errors
    /// What reading it gives.
    pub fn mrtd(&self) -> Result<premap_tdx::Digest, MachineError> {
        self.vm.mrtd().map_err(call("reading the MRTD"))
    }

    /// Has the guest accept every page of these ranges, a share each vCPU, all at once.
    ///
    /// # Errors
    /// A page that can't be accepted, or a thread that the host does not give.
    ///
    /// # Panics
    /// If a vCPU's thread panicked.
    pub fn accept(&mut self, memory: &[GpaRange]) -> Result<Acceptance, MachineError> {
        let vcpus = self.vcpus.len() as u64;
        let before = self.exits()?;
        let jobs: Vec<_> = (0..).zip(&mut self.vcpus).collect();
        let results = together(jobs, |(index, vcpu)| accept_share(vcpu, memory, index, vcpus))?;
        let (mut all, mut first, mut last) = (Accepted::default(), None, None);
        for (vcpu, (start, end, result)) in results.into_iter().enumerate() {
            all += result.map_err(|fault| failed(vcpu, &fault))?;
            first = first.into_iter().chain([start]).min();
            last = last.into_iter().chain([end]).max();
        }
        let elapsed =
            first.zip(last).map_or(Duration::ZERO, |(first, last): (Instant, Instant)| last - first);
        Ok(Acceptance { elapsed, pages: all.pages, already: all.already, exits: self.exits()? - before })
    }

    fn exits(&self) -> Result<u64, MachineError> {
        let exits = |vcpu: &SoftVcpu| {
            let stats = vcpu.stats().map_err(call("KVM_GET_STATS_FD of a vCPU"))?;
            stats.get("exits").ok_or(MachineError::NoStatistic("exits"))
        };
        self.vcpus.iter().map(exits).sum()
    }
}

/// One vCPU's share of each range.
fn accept_share(
    vcpu: &mut SoftVcpu,
    memory: &[GpaRange],
    index: u64,
    vcpus: u64,
) -> (Instant, Instant, Result<Accepted, GuestFault>) {
    let start = Instant::now();
    let mut all = Accepted::default();
    for range in memory {
        let cut = |index: u64| range.pages() * index / vcpus * PAGE_SIZE;
        let (from, to) = (cut(index), cut(index + 1));
        let Ok(share) = GpaRange::try_new(range.start().wrapping_add(from), to - from) else { continue };
        match vcpu.accept(share) {
            Ok(accepted) => all += accepted,
            Err(fault) => return (start, Instant::now(), Err(fault)),
        }
    }
    (start, Instant::now(), Ok(all))
}

fn failed(vcpu: usize, fault: &GuestFault) -> MachineError {
    let error = match *fault {
        GuestFault::Failed { errno, .. } => GuestError::Call { call: "TDG.MEM.PAGE.ACCEPT", errno },
        _ => GuestError::Exit { reason: fault.to_string() },
    };
    MachineError::Guest { vcpu, error }
}

fn tdx(name: &'static str) -> impl FnOnce(TdxError) -> MachineError {
    move |error| MachineError::Call { call: name, errno: error.errno }
}
