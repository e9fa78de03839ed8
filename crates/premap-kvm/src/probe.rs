//! Whether this KVM can pre-fault: asked by capability *and* by ioctl.
//!
//! The capability alone is not enough: its number, 236, means something else in another kernel tree. The ioctl alone is
//! not enough either: kernels that know it refuse it where they shadow the guest's page tables. The probe maps nothing.

use std::fmt;

use crate::abi::{KVM_CAP_PRE_FAULT_MEMORY, kvm_pre_fault_memory};
use crate::{Errno, Vcpu, Vm};

/// What the probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PreFault {
    /// The capability is there and the ioctl is known.
    Supported,
    /// The ioctl is known, the capability is 0: this KVM maps guests by shadow page tables (EPT or NPT is off or absent).
    ShadowPaging,
    /// Neither: a kernel before 6.11.
    NotInKernel,
    /// The capability is set, yet the ioctl is unknown: this kernel uses number 236 for something else.
    ForeignCapability,
    /// The probe itself failed.
    Failed(Errno),
}

impl PreFault {
    /// Whether pre-faulting can be expected to work.
    #[must_use]
    pub const fn is_supported(self) -> bool {
        matches!(self, Self::Supported)
    }
}

impl fmt::Display for PreFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supported => f.write_str("KVM_PRE_FAULT_MEMORY is supported"),
            Self::ShadowPaging => f.write_str(
                "this KVM shadows the guest's page tables (no EPT or NPT), which has no pre-fault; load kvm_intel with \
                 ept=1 or kvm_amd with npt=1 on a machine that has it",
            ),
            Self::NotInKernel => f.write_str("this kernel has no KVM_PRE_FAULT_MEMORY; Linux 6.11 or later has it"),
            Self::ForeignCapability => f.write_str(
                "capability 236 is set but the ioctl is unknown: this kernel uses the number for something else",
            ),
            Self::Failed(errno) => write!(f, "probing KVM_PRE_FAULT_MEMORY failed: {errno}"),
        }
    }
}

/// Asks `vm` for the capability and `vcpu` for the ioctl. Nothing is mapped and no state changes.
pub fn pre_fault(vm: &(impl Vm + ?Sized), vcpu: &mut impl Vcpu) -> PreFault {
    let capability = match vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY) {
        Ok(value) => value != 0,
        Err(errno) => return PreFault::Failed(errno),
    };
    // Flags are checked before anything else, so a kernel that knows the ioctl says EINVAL and has done nothing.
    let mut range = kvm_pre_fault_memory { flags: u64::MAX, ..Default::default() };
    match (vcpu.pre_fault_memory(&mut range), capability) {
        (Err(Errno::INVAL), true) => PreFault::Supported,
        (Err(Errno::INVAL | Errno::OPNOTSUPP), false) => PreFault::ShadowPaging,
        (Err(Errno::NOTTY), true) => PreFault::ForeignCapability,
        (Err(Errno::NOTTY), false) => PreFault::NotInKernel,
        (Err(errno), _) => PreFault::Failed(errno),
        // A call with unknown flags that succeeds is not the ioctl that premap knows.
        (Ok(()), _) => PreFault::ForeignCapability,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Result, Stats, abi};

    struct Fake {
        capability: u32,
        ioctl: Result<()>,
    }

    // The trait has unsafe methods; these do nothing.
    #[expect(unsafe_code, reason = "the trait's methods are unsafe to call")]
    impl Vm for Fake {
        fn check_extension(&self, capability: u32) -> Result<u32> {
            assert_eq!(capability, KVM_CAP_PRE_FAULT_MEMORY);
            Ok(self.capability)
        }

        fn enable_cap(&self, _: &abi::kvm_enable_cap) -> Result<()> {
            Err(Errno::INVAL)
        }

        unsafe fn set_user_memory_region(&self, _: &abi::kvm_userspace_memory_region) -> Result<()> {
            Err(Errno::INVAL)
        }

        unsafe fn get_dirty_log(&self, _: u32, _: &mut [u64]) -> Result<()> {
            Err(Errno::NOENT)
        }

        fn stats(&self) -> Result<Stats> {
            Ok(Stats::default())
        }
    }

    impl Vcpu for Fake {
        fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
            assert_eq!((range.size, range.flags), (0, u64::MAX), "the probe must map nothing");
            self.ioctl
        }

        fn renew_root(&mut self) -> Result<()> {
            unreachable!("the probe changes nothing")
        }

        fn stats(&self) -> Result<Stats> {
            Ok(Stats::default())
        }
    }

    fn check(capability: u32, ioctl: Result<()>, expected: PreFault) {
        assert_eq!(pre_fault(&Fake { capability, ioctl }, &mut Fake { capability, ioctl }), expected);
    }

    #[test]
    fn capability_and_ioctl_decide_together() {
        check(1, Err(Errno::INVAL), PreFault::Supported);
        check(0, Err(Errno::INVAL), PreFault::ShadowPaging);
        check(0, Err(Errno::NOTTY), PreFault::NotInKernel);
        check(1, Err(Errno::NOTTY), PreFault::ForeignCapability);
        check(1, Ok(()), PreFault::ForeignCapability);
        check(1, Err(Errno::IO), PreFault::Failed(Errno::IO));
    }
}
