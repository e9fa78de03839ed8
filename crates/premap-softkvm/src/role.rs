//! What a second-stage root is for. vCPUs of the same role share a root.

use premap_address::Gpa;
use premap_mmu::Levels;

/// The role of a root: what its tables depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Role {
    /// The height of the tables.
    pub(crate) levels: Levels,
}

impl Role {
    /// The role of a vCPU in normal operation, on a host that addresses memory up to `gpa_end`.
    pub(crate) fn base(gpa_end: Gpa) -> Self {
        Self { levels: if gpa_end > Levels::Four.limit() { Levels::Five } else { Levels::Four } }
    }
}
