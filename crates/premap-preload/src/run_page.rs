//! The page that a vCPU shares with its VMM (`struct kvm_run`), for the time of one run.
//!
//! A VMM that wants a vCPU back sends its thread a signal, whose handler sets `immediate_exit` there: `KVM_RUN` then
//! returns at once with EINTR, also where the signal came just before the call. A thread that waits in here in place of
//! `KVM_RUN` looks at the same flag.
//!
//! The mapping keeps the vCPU's file open, so it is made and given up by the library's own thread, run by run.
// UNSAFETY: maps a page of the vCPU's and reads and writes two fields of it.
#![expect(unsafe_code, reason = "a page shared with KVM")]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use premap_kvm::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Where `immediate_exit` lies.
const IMMEDIATE_EXIT: usize = 1;
/// What the library sets it to.
const OWN_EXIT: u8 = 2;
const BYTES: usize = 4096;

/// The page.
#[derive(Debug)]
pub(crate) struct RunPage(*mut u8);

// SAFETY: the mapping belongs to this value alone, whatever thread has it, and is only accessed atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps a vCPU's page.
    ///
    /// # Errors
    /// The kernel's errno.
    pub(crate) fn map(vcpu: &OwnedFd) -> Result<Self, Errno> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let page = unsafe { mmap(std::ptr::null_mut(), BYTES, flags, MapFlags::SHARED, vcpu, 0) }?;
        Ok(Self(page.cast()))
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as this value. The VMM and KVM access it as one byte.
        unsafe { AtomicU8::from_ptr(self.0.wrapping_add(IMMEDIATE_EXIT)) }
    }

    /// Whether the VMM wants the vCPU back.
    pub(crate) fn is_exit_wanted(&self) -> bool {
        self.flag().load(Ordering::Acquire) != 0
    }

    /// Makes a call of `KVM_RUN` that finishes what an exit left open, does not enter the guest, and says EINTR.
    ///
    /// KVM reads the flag and never writes it: a VMM may go on until it sees it set. So what a handler has set stays, whether
    /// it ran before or meanwhile. KVM takes any value but 0, handlers write 1, and what is set here is neither: that alone
    /// is taken back.
    pub(crate) fn without_entry<T>(&self, run: impl FnOnce() -> T) -> T {
        let flag = self.flag();
        let is_own = flag.compare_exchange(0, OWN_EXIT, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let value = run();
        if is_own {
            // Where that fails, the VMM has written it.
            let _ = flag.compare_exchange(OWN_EXIT, 0, Ordering::AcqRel, Ordering::Acquire);
        }
        value
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing refers to it any more. It can't fail.
        let _ = unsafe { munmap(self.0.cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_that_the_vmm_set_stays_set_whenever_it_did() {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let page =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), BYTES, flags, MapFlags::PRIVATE) };
        let page = RunPage(page.unwrap().cast());
        let during = |write: Option<u8>| {
            page.without_entry(|| {
                assert!(page.is_exit_wanted(), "KVM must see it");
                write.into_iter().for_each(|value| page.flag().store(value, Ordering::Release));
            });
            page.flag().swap(0, Ordering::AcqRel)
        };
        assert_eq!((during(None), during(Some(1)), during(Some(0))), (0, 1, 0));
        page.flag().store(1, Ordering::Release);
        assert_eq!(during(None), 1);
    }
}
