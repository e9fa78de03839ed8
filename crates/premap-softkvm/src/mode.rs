//! What a vCPU is about: the part of its state on which its root depends.

use premap_address::Gpa;

/// What a vCPU is about. It decides which MMU maps for it, which of the VM's address spaces it sees, and where the table
/// lies that is shadowed, if one is.
///
/// A vCPU here has no registers, so that it fetches no instruction and walks no tables of the guest's where the second stage
/// is two-dimensional: it touches guest-physical addresses there. Where tables are shadowed it touches addresses *under*
/// them, which is what the shadow translates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CpuMode {
    /// Without paging, as after a reset.
    #[default]
    PagingOff,
    /// Under page tables of the guest's own: 64-bit paging, four levels, the top-level table at `cr3`.
    Paging {
        /// Where the top-level table lies.
        cr3: Gpa,
    },
    /// System management mode: the VM's second address space, under page tables or without paging.
    SystemManagement {
        /// Where the top-level table lies, if paging is on.
        cr3: Option<Gpa>,
    },
    /// An L2 guest whose L1 uses nested paging: L1's tables are shadowed, and addresses touched are L2's physical ones.
    NestedPaging {
        /// Where L1's top-level table lies, in L1's memory.
        ncr3: Gpa,
    },
    /// An L2 guest whose L1 uses shadow paging: it runs under the tables that L1 made for it.
    NestedShadow {
        /// Where the top-level table lies, in L1's memory.
        cr3: Gpa,
    },
}

impl CpuMode {
    /// Whether it is system management mode.
    pub(crate) fn is_system_management(self) -> bool {
        matches!(self, Self::SystemManagement { .. })
    }

    /// Whether a guest's guest runs.
    pub(crate) fn is_guest_mode(self) -> bool {
        matches!(self, Self::NestedPaging { .. } | Self::NestedShadow { .. })
    }

    /// The guest's own top-level table, where paging is on.
    pub(crate) fn table(self) -> Option<Gpa> {
        match self {
            Self::PagingOff => None,
            Self::Paging { cr3 } | Self::NestedShadow { cr3 } => Some(cr3),
            Self::SystemManagement { cr3 } => cr3,
            Self::NestedPaging { ncr3 } => Some(ncr3),
        }
    }
}
