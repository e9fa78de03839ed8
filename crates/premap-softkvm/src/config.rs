//! How a software VM is made.

use std::fmt;

use crate::Profile;

/// Whether the second stage is in hardware's hands (EPT, NPT), as KVM's modules are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tdp {
    /// Two-dimensional paging under the TDP MMU: many vCPUs fill the tables at the same time, and what is mapped stays until
    /// it is taken away.
    #[default]
    On,
    /// `tdp_mmu=0`: two-dimensional paging, its tables filled by the shadow MMU as direct pages, one vCPU at a time, in pages
    /// of 4 KiB. They are limited in number, so the oldest mappings can go at any moment.
    WithoutTdpMmu,
    /// `npt=0` or `ept=0`: the processor walks shadows of the guest's own page tables. The capability is 0 and pre-faulting
    /// gives EOPNOTSUPP.
    Off,
}

/// How high the second-stage tables are: four levels or five.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TdpLevels {
    /// AMD's rule: as high as the host's own tables, which have five levels where four do not reach all of its physical
    /// addresses.
    #[default]
    OfHost,
    /// Intel's rule: five where the host can and the guest was told, by its CPUID, of more than 48 bits of physical address.
    /// vCPUs that were told differently have different roots then.
    OfGuest,
}

/// What a pre-fault does on a vCPU in system management mode or in guest mode, whose roots are others than those of normal
/// operation: the question that the design of April 2024 left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialModes {
    /// EOPNOTSUPP.
    Refused,
    /// It fills the root that the vCPU has in this mode.
    OwnRoot,
    /// It fills the root that the vCPU has in normal operation, by the slots of that.
    BaseRoot,
}

/// How many bits of guest-physical address the host's processor has (MAXPHYADDR): 36 to 52.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PhysicalBits(u8);

impl PhysicalBits {
    /// Takes a number of bits, or gives `None` if no processor has so many or so few.
    #[must_use]
    pub const fn new(bits: u8) -> Option<Self> {
        if matches!(bits, 36..=52) { Some(Self(bits)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl Default for PhysicalBits {
    /// 48: what four levels of tables reach.
    fn default() -> Self {
        Self(48)
    }
}

impl fmt::Debug for PhysicalBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bits", self.0)
    }
}

/// What `KVM_CREATE_VM` is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmType {
    /// `KVM_X86_DEFAULT_VM`: all memory is shared with the VMM.
    #[default]
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: pages can be private, without hardware that enforces it.
    SoftwareProtected,
    /// `KVM_X86_TDX_VM`: a TD, whose private memory the TDX module keeps.
    Tdx,
}

/// What a software VM is to be like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoftConfig {
    /// Which release of Linux it behaves as.
    pub profile: Profile,
    /// What kind of VM it is.
    pub vm_type: VmType,
    /// Whether it has two-dimensional paging.
    pub tdp: Tdp,
    /// How far guest-physical memory can reach.
    pub physical_bits: PhysicalBits,
    /// How high the second-stage tables are.
    pub levels: TdpLevels,
    /// What a pre-fault does in system management mode and in guest mode; `None` is what the profile does.
    pub special_modes: Option<SpecialModes>,
}
