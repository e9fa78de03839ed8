//! What a vCPU is about: on this its second-stage root depends, and whether that can be pre-faulted.

use std::fmt;

/// What a vCPU is about when its memory is touched or pre-faulted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// 64-bit mode, under page tables of the guest's own.
    #[default]
    Paging,
    /// Protected mode without paging, as firmware starts.
    PagingOff,
    /// System management mode: address space 1, under the same page tables.
    SystemManagement,
    /// An L2 guest whose L1 uses nested paging: L1's nested tables map every address to itself.
    NestedPaging,
    /// An L2 guest whose L1 uses shadow paging: L2's page tables are the ones that the processor walks.
    NestedShadow,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 5] =
        [Self::Paging, Self::PagingOff, Self::SystemManagement, Self::NestedPaging, Self::NestedShadow];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Paging => "paging",
            Self::PagingOff => "paging off",
            Self::SystemManagement => "system management mode",
            Self::NestedPaging => "guest mode, nested paging",
            Self::NestedShadow => "guest mode, shadow paging",
        })
    }
}
