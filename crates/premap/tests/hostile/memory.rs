//! Memory of the host for guests that are made up.
// UNSAFETY: mmap and munmap of memory that nothing refers to.
#![expect(unsafe_code, reason = "maps memory to populate it")]

use std::ffi::c_void;

use premap::Hva;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Some pages, and as many that can't be touched.
pub(crate) struct Memory([*mut c_void; 2]);

// SAFETY: only the presence of the pages is changed, and by nobody but the kernel.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) const PAGES: u64 = 64;
    const BYTES: usize = 64 * 4096;

    pub(crate) fn new() -> Self {
        Self([ProtFlags::READ | ProtFlags::WRITE, ProtFlags::empty()].map(|protection| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe { mmap_anonymous(std::ptr::null_mut(), Self::BYTES, protection, MapFlags::PRIVATE) }
                .expect("the memory can be had")
        }))
    }

    pub(crate) fn there(&self) -> Hva {
        Hva::new(self.0[0].expose_provenance() as u64)
    }

    pub(crate) fn protected(&self) -> Hva {
        Hva::new(self.0[1].expose_provenance() as u64)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for base in self.0 {
            // SAFETY: the mapping is ours and nothing refers to it.
            unsafe { munmap(base, Self::BYTES) }.expect("an own mapping can be unmapped");
        }
    }
}
