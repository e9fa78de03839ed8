//! The traits by which the rest of premap launches TDs.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_bindings::kvm_cpuid_entry2;
use premap_address::{Gfn, Gpa, GpaRange, PAGE_SIZE};
use premap_kvm::Errno;
use premap_kvm::tdx::{
    KVM_TDX_MEASURE_MEMORY_REGION, TdVcpu, TdVm, TdxError, kvm_tdx_capabilities, kvm_tdx_init_mem_region,
    kvm_tdx_init_vm, tdx_cpuid,
};
use premap_tdx::Digest;

use super::PAGE_BYTES;
use super::build::Td;
use super::memory::Addition;
use crate::machine::Machine;
use crate::private::Kind;
use crate::profile::Building;
use crate::signals::Held;
use crate::vcpu::SoftVcpu;
use crate::vm::SoftVm;

/// What XFAM may have: x87, SSE, AVX, AVX-512, PKRU.
const SUPPORTED_XFAM: u64 = 0x2e7;
/// The most vCPUs of a TD.
const MOST_VCPUS: u16 = 576;

impl Machine {
    /// The TD, where this VM is one.
    pub(crate) fn td(&self) -> Result<&Td, Errno> {
        self.td.as_ref().ok_or(Errno::INVAL)
    }
}

impl TdVm for SoftVm {
    fn tdx_capabilities(&self) -> Result<Box<kvm_tdx_capabilities>, TdxError> {
        self.machine().check_alive()?;
        self.machine().td()?;
        Ok(Box::new(kvm_tdx_capabilities { supported_xfam: SUPPORTED_XFAM, ..Default::default() }))
    }

    fn tdx_init_vm(&self, init: &kvm_tdx_init_vm) -> Result<(), TdxError> {
        self.machine().check_alive()?;
        let td = self.machine().td()?;
        if init.attributes != 0 || init.xfam & !SUPPORTED_XFAM != 0 {
            return Err(Errno::INVAL.into());
        }
        td.init_vm(init, MOST_VCPUS)
    }

    fn tdx_finalize_vm(&self) -> Result<(), TdxError> {
        self.machine().check_alive()?;
        self.machine().td()?.finalize()
    }
}

impl SoftVm {
    /// A test hook: the TD's MRTD, which no KVM tells; a guest learns it from a report.
    ///
    /// # Errors
    /// EINVAL: no TD, or not initialised.
    pub fn mrtd(&self) -> Result<Digest, Errno> {
        self.machine().td()?.mrtd()
    }
}

impl TdVcpu for SoftVcpu {
    fn tdx_init_vcpu(&mut self, rcx: u64) -> Result<(), TdxError> {
        self.machine.check_alive()?;
        let td = self.machine.td()?;
        if self.td.is_some() {
            return Err(Errno::INVAL.into());
        }
        self.td = Some(td.create_vcpu(self.id(), rcx)?);
        Ok(())
    }

    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        flags: u32,
    ) -> Result<(), TdxError> {
        let machine = std::sync::Arc::clone(&self.machine);
        machine.check_alive()?;
        let td = machine.td()?;
        if self.td.is_none() {
            return Err(Errno::INVAL.into());
        }
        let building = machine.rules().building;
        if building == Building::Combined && self.id() != 0 {
            return Err(Errno::INVAL.into());
        }
        // One at a time where the source goes through the VM; page by page, on any vCPU, where it is an argument.
        let _alone = (building != Building::Reserved).then(|| td.guard());
        if td.is_runnable() || flags & !KVM_TDX_MEASURE_MEMORY_REGION != 0 {
            return Err(Errno::INVAL.into());
        }
        let bytes = region.nr_pages.checked_mul(PAGE_SIZE).ok_or(Errno::INVAL)?;
        GpaRange::try_new(Gpa::new(region.gpa), bytes)
            .ok()
            .filter(|range| region.source_addr.is_multiple_of(PAGE_SIZE) && super::guest::is_private(*range))
            .ok_or(Errno::INVAL)?;
        let source = File::open("/proc/self/mem").map_err(|_| Errno::IO)?;
        let signals = Held::new();
        while region.nr_pages > 0 {
            if signals.pending() {
                return Err(Errno::INTR.into());
            }
            let mut content = [0; PAGE_BYTES];
            source.read_exact_at(&mut content, region.source_addr).map_err(|_| Errno::FAULT)?;
            let measured = flags & KVM_TDX_MEASURE_MEMORY_REGION != 0;
            let gfn = Gpa::new(region.gpa).frame();
            if machine.add_page(td, Addition { gfn, source: &content, measured })? {
                region.source_addr += PAGE_SIZE;
                region.gpa += PAGE_SIZE;
                region.nr_pages -= 1;
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn tdx_get_cpuid(&mut self, cpuid: &mut tdx_cpuid) -> Result<(), TdxError> {
        self.machine.check_alive()?;
        let built = self.machine.td()?.built()?;
        Ok(copy_cpuid(&built.cpuid, cpuid)?)
    }
}

/// Gives the leaves, if there is room for them.
fn copy_cpuid(from: &[kvm_cpuid_entry2], cpuid: &mut tdx_cpuid) -> Result<(), Errno> {
    let room = cpuid.entries.len().min(cpuid.nent as usize);
    cpuid.nent = u32::try_from(from.len()).unwrap_or(u32::MAX);
    let room = cpuid.entries[..room].get_mut(..from.len()).ok_or(Errno::TOOBIG)?;
    room.copy_from_slice(from);
    Ok(())
}

impl Machine {
    /// Adds one page, if nothing is in the way.
    fn add_page(&self, td: &Td, addition: Addition<'_>) -> Result<bool, TdxError> {
        let _reading = self.slots.enter();
        let gfn = addition.gfn;
        let sequence = self.invalidations.snapshot();
        let slots = self.slots.current();
        let slot = slots.find(crate::memslots::AddressSpace::Normal, gfn);
        let private = slot.and_then(|slot| slot.private.as_ref()).ok_or(Errno::INVAL)?;
        if self.kind_of(gfn, 1).0 != Kind::Private {
            return Err(Errno::INVAL.into());
        }
        if private.is_closed() {
            return Err(Errno::FAULT.into());
        }
        let page = gfn..Gfn::new(gfn.number() + 1);
        let valid = || self.invalidations.allows(sequence, &page);
        match self.rules().building {
            Building::Reserved => td.add_reserved(addition, valid),
            Building::Combined | Building::ByItself => td.map_and_add(addition, valid),
            Building::NoTdx => Err(Errno::INVAL.into()),
        }
    }
}
