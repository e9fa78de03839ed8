//! A vCPU whose calls go the ways that a kernel's can: they stall until its root is renewed, one asks to be made again, and
//! from then on they get through.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Errno, Result, Stats, Vcpu};
use rustix::thread::futex;

/// A vCPU on top of another.
pub(crate) struct Troubled<'a> {
    vcpu: &'a mut (dyn Vcpu + Send),
    is_stale: bool,
    is_busy: bool,
    /// Set when a call stalls.
    stalls: &'a AtomicBool,
}

impl<'a> Troubled<'a> {
    pub(crate) fn new(vcpu: &'a mut (dyn Vcpu + Send), stalls: &'a AtomicBool) -> Self {
        Self { vcpu, is_stale: true, is_busy: true, stalls }
    }
}

impl Vcpu for Troubled<'_> {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
        if self.is_stale {
            self.stalls.store(true, Ordering::Release);
            // As in a kernel that spins: nothing but a signal ends it.
            let ended = futex::wait(&AtomicU32::new(0), futex::Flags::PRIVATE, 0, None);
            assert_eq!(ended, Err(Errno::INTR));
            return Err(Errno::INTR);
        }
        if std::mem::take(&mut self.is_busy) {
            return Err(Errno::AGAIN);
        }
        self.vcpu.pre_fault_memory(range)
    }

    fn renew_root(&mut self) -> Result<()> {
        // Whether it works or not, and not before a run has met the stall.
        self.is_stale &= !self.stalls.load(Ordering::Acquire);
        self.vcpu.renew_root()
    }

    fn stats(&self) -> Result<Stats> {
        self.vcpu.stats()
    }
}
