//! Statistics under KVM's names.

use premap_kvm::Stats;
use premap_mmu::Leaves;

/// What a vCPU counts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VcpuCounters {
    /// Times that the guest was left.
    pub(crate) exits: u64,
    /// Times that the fault path began. A pre-fault is not counted.
    pub(crate) pf_taken: u64,
    /// Faults that made or widened a mapping.
    pub(crate) pf_fixed: u64,
    /// Faults for whose access there is no memory: the instruction is emulated.
    pub(crate) pf_emulate: u64,
    /// Faults that are the guest's own, by its page tables.
    pub(crate) pf_guest: u64,
    /// Faults that found all well.
    pub(crate) pf_spurious: u64,
    /// Fixed faults that only took write protection away.
    pub(crate) pf_fast: u64,
    /// MMIO mappings made, by faults and by pre-faults.
    pub(crate) pf_mmio_spte_created: u64,
}

impl VcpuCounters {
    pub(crate) fn export(&self) -> Stats {
        [
            ("exits", self.exits),
            ("pf_taken", self.pf_taken),
            ("pf_fixed", self.pf_fixed),
            ("pf_emulate", self.pf_emulate),
            ("pf_guest", self.pf_guest),
            ("pf_spurious", self.pf_spurious),
            ("pf_fast", self.pf_fast),
            ("pf_mmio_spte_created", self.pf_mmio_spte_created),
        ]
        .into_iter()
        .collect()
    }
}

/// A VM's statistics.
pub(crate) fn vm(leaves: Leaves, remote_tlb_flush: u64) -> Stats {
    [
        ("pages_4k", leaves.size_4k),
        ("pages_2m", leaves.size_2m),
        ("pages_1g", leaves.size_1g),
        ("remote_tlb_flush", remote_tlb_flush),
    ]
    .into_iter()
    .collect()
}
