//! `/dev/kvm`: presence and permission, API version, the pre-fault ioctl, private memory.

use premap_guest::{Linux, Machine, MachineError};
use premap_kvm::abi::{KVM_CAP_GUEST_MEMFD, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_VM_TYPES};
use premap_kvm::probe::{self, PreFault};

use super::check::{Check, Status};
use crate::backend::remedy;

/// The version of KVM's API since 2007.
const API_VERSION: i32 = 12;

/// Judges the attempt to open the device.
pub(super) fn opened(result: Result<(), &MachineError>) -> Check {
    let name = "/dev/kvm";
    match result {
        Ok(()) => Check::good(name, "opens for reading and writing"),
        Err(MachineError::Open { path, errno }) => {
            Check::new(name, Status::Missing, format!("opening {path} failed: {errno}"))
                .advise(remedy(*errno))
        }
        Err(other) => Check::new(name, Status::Missing, other.to_string()),
    }
}

pub(super) fn api_version(linux: &Linux) -> Check {
    judge_version(linux.kvm().get_api_version())
}

fn judge_version(version: i32) -> Check {
    match version {
        API_VERSION => Check::good("KVM API", "version 12"),
        other => Check::new("KVM API", Status::Missing, format!("version {other} where 12 is the only one"))
            .advise("see what provides /dev/kvm here"),
    }
}

/// Asks a scratch VM for the capability and its vCPU for the ioctl.
pub(super) fn pre_fault(linux: &Linux) -> Check {
    let capability = linux.kvm().check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into());
    let mut machine = match Machine::new(linux, 1) {
        Ok(machine) => machine,
        Err(error) => {
            return Check::new("pre-fault ioctl", Status::Missing, format!("no scratch VM: {error}"));
        }
    };
    let lent = machine.lend();
    match lent.vcpus.first_mut() {
        Some(vcpu) => judge_support(capability, probe::pre_fault(lent.vm, vcpu)),
        None => Check::new("pre-fault ioctl", Status::Missing, "no scratch vCPU"),
    }
}

fn judge_support(capability: i32, support: PreFault) -> Check {
    let name = "pre-fault ioctl";
    let seen = format!("capability 236 is {capability}");
    match support {
        PreFault::Supported => Check::good(name, format!("{seen}, and the ioctl 0xc040aed5 is known")),
        // What helps is in the probe's own words.
        other => {
            let (result, advice) = match other.to_string().split_once("; ") {
                Some((what, advice)) => (what.to_owned(), Some(advice.to_owned())),
                None => (other.to_string(), None),
            };
            let check = Check::new(name, Status::Missing, format!("{seen}: {result}"));
            Check { advice, ..check }
        }
    }
}

/// guest_memfd, and the kinds of VM.
pub(super) fn private_memory(linux: &Linux) -> [Check; 2] {
    let ask = |capability: u32| linux.kvm().check_extension_raw(capability.into());
    [judge_guest_memfd(ask(KVM_CAP_GUEST_MEMFD)), judge_types(ask(KVM_CAP_VM_TYPES))]
}

fn judge_guest_memfd(capability: i32) -> Check {
    if capability > 0 {
        Check::good("guest_memfd", "there, for memory that the host can't read")
    } else {
        Check::new("guest_memfd", Status::Limited, "not there: no private memory").advise(
            "only needed for confidential VMs: Linux 6.8 or later with a VM type that has private memory",
        )
    }
}

/// Kinds of VM by their bit in KVM_CAP_VM_TYPES.
const TYPES: [&str; 6] = ["default", "software-protected", "SEV", "SEV-ES", "SNP", "TDX"];

fn judge_types(bits: i32) -> Check {
    let has = |bit: usize| bits >> bit & 1 == 1;
    // A kernel without the capability knows one kind only.
    let names: Vec<_> =
        TYPES.iter().enumerate().filter(|(bit, _)| has(*bit)).map(|(_, name)| *name).collect();
    let names = if names.is_empty() { "default".to_owned() } else { names.join(", ") };
    let (snp, tdx) = (has(4), has(5));
    let told = |there| if there { "yes" } else { "no" };
    let result = format!("{names} (TDX: {}, SNP: {})", told(tdx), told(snp));
    if tdx || snp {
        Check::good("VM types", result)
    } else {
        Check::new("VM types", Status::Limited, result).advise(
            "only needed for confidential VMs: a host with TDX (kvm_intel tdx=1) or SNP (kvm_amd sev_snp=1)",
        )
    }
}

#[cfg(test)]
mod tests {
    use premap_kvm::Errno;

    use super::*;

    #[test]
    fn an_unopened_device_is_told_with_path_errno_and_remedy() {
        let denied = MachineError::Open { path: "/dev/kvm", errno: Errno::ACCESS };
        let check = opened(Err(&denied));
        assert_eq!(check.status, Status::Missing);
        assert!(check.result.contains("/dev/kvm") && check.result.contains("os error 13"), "{check:?}");
        assert!(check.advice.unwrap().contains("setfacl"));
        assert_eq!(opened(Ok(())).status, Status::Good);
    }

    #[test]
    fn support_is_capability_and_ioctl_together() {
        assert_eq!(judge_support(1, PreFault::Supported).status, Status::Good);
        let shadow = judge_support(0, PreFault::ShadowPaging);
        assert!(shadow.result.contains("capability 236 is 0"), "{shadow:?}");
        assert!(shadow.advice.unwrap().contains("ept=1"));
        assert_eq!(judge_support(1, PreFault::ForeignCapability).status, Status::Missing);
    }

    #[test]
    fn vm_types_are_read_from_their_bits() {
        for (bits, result, status) in [
            (0, "default (TDX: no, SNP: no)", Status::Limited),
            (0b11, "default, software-protected (TDX: no, SNP: no)", Status::Limited),
            (0b01_1111, "default, software-protected, SEV, SEV-ES, SNP (TDX: no, SNP: yes)", Status::Good),
            (0b10_0001, "default, TDX (TDX: yes, SNP: no)", Status::Good),
        ] {
            let check = judge_types(bits);
            assert_eq!((check.result.as_str(), check.status), (result, status));
        }
    }

    #[test]
    fn versions_and_guest_memfd_are_judged() {
        assert_eq!(judge_version(12).status, Status::Good);
        assert_eq!(judge_version(11).status, Status::Missing);
        assert_eq!(judge_guest_memfd(1).status, Status::Good);
        assert_eq!(judge_guest_memfd(0).status, Status::Limited);
    }
}
