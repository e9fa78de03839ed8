//! A vCPU: what its TDVPS says.

use crate::locks::Sharex;
use crate::sync::{Field, Ordering};

/// Not associated with any logical processor.
pub(crate) const NO_PROCESSOR: u64 = u64::MAX;

/// A vCPU. All but its association changes under its lock.
#[derive(Debug)]
pub(crate) struct Vcpu {
    /// The TDVPR's lock.
    pub(crate) lock: Sharex,
    /// Pages that it has, its TDVPR included.
    pub(crate) pages: Field,
    ready: Field,
    /// Its number in the TD.
    pub(crate) index: Field,
    /// RCX at the guest's first instruction.
    pub(crate) initial_rcx: Field,
    pub(crate) x2apic_id: Field,
    /// The logical processor that it is associated with.
    pub(crate) processor: Field,
}

impl Vcpu {
    pub(super) fn new() -> Self {
        let field = |value| Field::new(value);
        Self {
            lock: Sharex::new(),
            pages: field(0),
            ready: field(0),
            index: field(0),
            initial_rcx: field(0),
            x2apic_id: field(0),
            processor: field(NO_PROCESSOR),
        }
    }

    /// Starts over as a new vCPU with one page. The caller has the TDVPR's PAMT entry.
    pub(crate) fn restart(&self) {
        self.pages.store(1, Ordering::Relaxed);
        self.ready.store(0, Ordering::Relaxed);
        self.processor.store(NO_PROCESSOR, Ordering::Release);
    }

    /// Whether VP.INIT was called.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) != 0
    }

    pub(crate) fn set_ready(&self) {
        self.ready.store(1, Ordering::Release);
    }
}
