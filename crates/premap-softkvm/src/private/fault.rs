//! What a vCPU tells its VMM of an access that it can't serve.

use premap_address::{Gfn, GpaRange, PAGE_SIZE};

use super::Kind;

/// `kvm_run.memory_fault` of a `KVM_EXIT_MEMORY_FAULT`: the call that gave it failed with EFAULT, or with what getting
/// the page gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault {
    /// What was wanted, always one page of 4 KiB.
    pub range: GpaRange,
    /// Whether it was wanted as private memory: `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
    pub private: bool,
}

impl MemoryFault {
    pub(crate) fn new(gfn: Gfn, kind: Kind) -> Self {
        Self { range: GpaRange::new(gfn.address(), PAGE_SIZE), private: kind == Kind::Private }
    }
}
