//! Which MMU maps for a vCPU, and whether that can be pre-faulted: a property of the MMU, not of the vCPU's state.
//!
//! | two-dimensional paging | normal operation, SMM, L1 with shadow paging | L1 with nested paging |
//! |---|---|---|
//! | on | [`Mmu::Tdp`] | [`Mmu::Shadow`] of L1's tables |
//! | `tdp_mmu=0` | [`Mmu::Direct`] | [`Mmu::Shadow`] of L1's tables |
//! | off | [`Mmu::Shadow`] of the guest's tables; [`Mmu::Nonpaging`] while paging is off | not to be had |

use premap_address::Gfn;
use premap_kvm::Errno;
use premap_mmu::Levels;

use crate::config::{PhysicalBits, SpecialModes, Tdp, TdpLevels};
use crate::machine::Machine;
use crate::memslots::AddressSpace;
use crate::mode::CpuMode;
use crate::profile::Support;
use crate::role::Role;

/// What maps for a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mmu {
    /// The TDP MMU.
    Tdp,
    /// Direct pages in the shadow MMU, which the processor walks as the second of two dimensions.
    Direct,
    /// Direct pages in the shadow MMU, in place of the tables that a guest without paging does not have.
    Nonpaging,
    /// The shadow of the tables whose top-level one lies in this frame.
    Shadow(Gfn),
}

impl Mmu {
    /// Whether it can be pre-faulted.
    fn can_pre_fault(self, support: Support) -> bool {
        match support {
            Support::ByFaultHandler => matches!(self, Self::Tdp | Self::Direct),
            Support::ByTdpMmu => self == Self::Tdp,
        }
    }
}

/// What a vCPU needs a root for. Roots of the same purpose are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RootKey {
    pub(crate) role: Role,
    pub(crate) mmu: Mmu,
}

impl Machine {
    /// The height of the second-stage tables for a vCPU that was told of so many bits of physical address.
    fn levels(&self, told: PhysicalBits) -> Levels {
        let is_far = |bits: PhysicalBits| bits.get() > 48;
        let five = match self.config.levels {
            TdpLevels::OfHost => is_far(self.config.physical_bits),
            TdpLevels::OfGuest => is_far(self.config.physical_bits) && is_far(told),
        };
        if five { Levels::Five } else { Levels::Four }
    }

    /// What a vCPU needs a root for in a mode.
    ///
    /// # Errors
    /// EINVAL: there is no such mode here. Nested paging is offered to a guest by two-dimensional paging alone, and what a
    /// TD's vCPU is about is not the VMM's to say.
    pub(crate) fn root_key(&self, mode: CpuMode, told: PhysicalBits) -> Result<RootKey, Errno> {
        if self.td.is_some() && mode != CpuMode::default() {
            return Err(Errno::INVAL);
        }
        let space = if mode.is_system_management() { AddressSpace::Smm } else { AddressSpace::Normal };
        let role = Role { levels: self.levels(told), space, guest_mode: mode.is_guest_mode() };
        let shadow = mode.table().map(|table| Mmu::Shadow(table.frame()));
        let mmu = match (self.config.tdp, mode) {
            (Tdp::Off, CpuMode::NestedPaging { .. }) => return Err(Errno::INVAL),
            (Tdp::On | Tdp::WithoutTdpMmu, CpuMode::NestedPaging { ncr3 }) => Mmu::Shadow(ncr3.frame()),
            (Tdp::On, _) => Mmu::Tdp,
            (Tdp::WithoutTdpMmu, _) => Mmu::Direct,
            (Tdp::Off, _) => shadow.unwrap_or(Mmu::Nonpaging),
        };
        Ok(RootKey { role, mmu })
    }

    /// What a pre-fault fills on a vCPU in a mode.
    ///
    /// # Errors
    /// EOPNOTSUPP: that can't be pre-faulted.
    pub(crate) fn pre_fault_key(&self, mode: CpuMode, told: PhysicalBits) -> Result<RootKey, Errno> {
        let is_special = mode.is_system_management() || mode.is_guest_mode();
        let special = self.config.special_modes.unwrap_or(self.rules().special_modes);
        let mode = match special {
            SpecialModes::Refused if is_special => return Err(Errno::OPNOTSUPP),
            // Without two-dimensional paging this is refused below, whatever the tables.
            SpecialModes::BaseRoot if is_special => CpuMode::default(),
            _ => mode,
        };
        let key = self.root_key(mode, told)?;
        if key.mmu.can_pre_fault(self.rules().support) { Ok(key) } else { Err(Errno::OPNOTSUPP) }
    }
}
