//! Going from one mode into another, and what becomes of the roots.

use premap_kvm::Errno;

use super::SoftVcpu;
use crate::config::PhysicalBits;
use crate::memslots::AddressSpace;
use crate::mode::CpuMode;

impl SoftVcpu {
    /// What the vCPU is about.
    #[must_use]
    pub fn mode(&self) -> CpuMode {
        self.mode
    }

    /// Puts the vCPU into a mode. What is mapped in its roots stays mapped, except that the shadow MMU may evict what nobody
    /// walks from.
    ///
    /// Entering or leaving system management mode, and turning paging on or off, let go of every root at hand; another table and
    /// guest mode keep the last three.
    ///
    /// # Errors
    /// EINVAL: guest mode with nested paging where there is no two-dimensional paging, or a TD, whose state is protected.
    pub fn enter(&mut self, mode: CpuMode) -> Result<(), Errno> {
        let key = self.machine.root_key(mode, self.told)?;
        let paging = |mode: CpuMode| mode.table().is_some();
        let is_reset = self.mode.is_system_management() != mode.is_system_management()
            || paging(self.mode) != paging(mode);
        if is_reset {
            self.roots.reset(key)
        } else {
            self.roots.rotate(key)
        }
        self.mode = mode;
        self.clear_memory_fault();
        Ok(())
    }

    /// Resets the vCPU, as INIT or RESET does: paging is off, and it is neither in system management mode nor in guest mode.
    pub fn reset(&mut self) {
        // Every VM has this mode.
        if let Ok(key) = self.machine.root_key(CpuMode::default(), self.told) {
            self.roots.reset(key);
        }
        self.mode = CpuMode::default();
        self.copied = None;
        self.clear_memory_fault();
    }

    /// Tells the guest, by CPUID, how many bits of physical address its processor has; else it is told of the host's number.
    /// On Intel it decides how high the second-stage tables are ([`TdpLevels::OfGuest`](crate::TdpLevels::OfGuest)).
    ///
    /// # Errors
    /// EINVAL: a TD, whose CPUID is not the VMM's to change any more.
    pub fn set_physical_bits(&mut self, bits: PhysicalBits) -> Result<(), Errno> {
        if self.machine.td.is_some() {
            return Err(Errno::INVAL);
        }
        self.told = bits;
        self.roots.reset(self.machine.root_key(self.mode, bits)?);
        Ok(())
    }

    /// The address space that the vCPU sees.
    pub(crate) fn space(&self) -> AddressSpace {
        self.roots.key().role.space
    }
}
