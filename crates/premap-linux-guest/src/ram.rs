//! The guest's memory: one memslot below the hole for devices, and one above where there is more.
// UNSAFETY: hands owned mappings to KVM, and to vm-memory, which fills them before the guest runs.
#![expect(unsafe_code, reason = "raw pointers to mappings that are owned here")]

use premap::{Region, Touch};
use premap_address::Gpa;
use premap_guest::{Backing, MachineError, Memory};
use premap_kvm::Vm;
use premap_kvm::abi::kvm_userspace_memory_region;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::error::LinuxGuestError;
use crate::layout::{ABOVE_HOLE, HOLE};

/// Memory by guest address.
#[derive(Debug)]
pub(crate) struct Ram {
    parts: Vec<(Gpa, Memory)>,
}

impl Ram {
    /// Maps `bytes` of memory; nothing is populated.
    pub(crate) fn new(bytes: u64, backing: Backing) -> Result<Self, LinuxGuestError> {
        let low = bytes.min(HOLE.raw());
        let mut parts = vec![(Gpa::new(0), Memory::new(low, backing)?)];
        if bytes > low {
            parts.push((ABOVE_HOLE, Memory::new(bytes - low, backing)?));
        }
        Ok(Self { parts })
    }

    /// Start and length of each part in the guest, lowest first.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Gpa, u64)> + '_ {
        self.parts.iter().map(|(gpa, memory)| (*gpa, memory.bytes()))
    }

    pub(crate) fn regions(&self, touch: Touch) -> Vec<Region> {
        self.parts.iter().map(|(gpa, memory)| memory.region(*gpa, touch)).collect()
    }

    /// Makes a memslot of each part.
    ///
    /// # Safety
    /// `self` must outlive the VM.
    pub(crate) unsafe fn tell(&self, vm: &impl Vm) -> Result<(), LinuxGuestError> {
        for (slot, (gpa, memory)) in (0..).zip(&self.parts) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa.raw(),
                memory_size: memory.bytes(),
                userspace_addr: memory.hva().raw(),
            };
            let call = "KVM_SET_USER_MEMORY_REGION";
            // SAFETY: a `Memory` is never referred to, and that it outlives the VM is this function's own contract.
            unsafe { vm.set_user_memory_region(&region) }
                .map_err(|errno| MachineError::Call { call, errno })?;
        }
        Ok(())
    }

    /// Lets `fill` reach the memory as vm-memory has it.
    pub(crate) fn with<R>(
        &self,
        fill: impl FnOnce(&GuestMemoryMmap) -> Result<R, LinuxGuestError>,
    ) -> Result<R, LinuxGuestError> {
        let refused = || LinuxGuestError::Os {
            what: "describing the memory to vm-memory",
            errno: premap_kvm::Errno::INVAL,
        };
        let mut regions = Vec::new();
        for (gpa, memory) in &self.parts {
            let start = usize::try_from(memory.hva().raw()).map_err(|_| refused())?;
            let bytes = usize::try_from(memory.bytes()).map_err(|_| refused())?;
            // SAFETY: the mapping is `bytes` long, readable and writable, and outlives the region, which ends with this
            // call. The region does not own it, and reaches it by volatile access only.
            let builder = unsafe {
                MmapRegionBuilder::<()>::new(bytes)
                    .with_raw_mmap_pointer(std::ptr::with_exposed_provenance_mut(start))
            };
            let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            let region = builder.build().map_err(|_| refused())?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(gpa.raw())).ok_or_else(refused)?);
        }
        fill(&GuestMemoryMmap::from_regions(regions).map_err(|_| refused())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_goes_on_above_the_hole() {
        let page = 4096;
        let ram = Ram::new((3 << 30) + page, Backing::Anonymous).unwrap();
        let expected = [(Gpa::new(0), 3 << 30), (Gpa::new(4 << 30), page)];
        assert_eq!(ram.parts().collect::<Vec<_>>(), expected);
        ram.with(|memory| {
            assert_eq!(memory.num_regions(), 2);
            memory.write_slice(b"here", GuestAddress((4 << 30) + 8)).unwrap();
            assert!(memory.write_slice(b"there", GuestAddress(3 << 30)).is_err());
            Ok(())
        })
        .unwrap();
        assert_eq!(ram.parts[1].1.read_word(8), u64::from(u32::from_le_bytes(*b"here")));
    }
}
