//! Which KVM to run on, and why.

use anyhow::anyhow;
use premap_guest::{Kernel, Linux, Machine, MachineError, Soft};
use premap_kvm::{Errno, probe};
use premap_softkvm::Profile;

use crate::failure::tell;
use crate::options;

/// A KVM to make machines on.
pub(crate) enum Backend {
    Kvm(Linux),
    Soft(Soft),
}

/// Takes what was asked for. `auto` says on stderr what it took, and why.
pub(crate) fn choose(asked: options::Backend, profile: Profile) -> anyhow::Result<Backend> {
    match asked {
        options::Backend::Soft => Ok(Backend::Soft(Soft::new(profile))),
        options::Backend::Kvm => match Linux::open() {
            Ok(linux) => Ok(Backend::Kvm(linux)),
            Err(error) => Err(anyhow!("--backend kvm: {}, or use --backend soft", unopened(&error))),
        },
        options::Backend::Auto => Ok(match pre_faulting() {
            Ok(linux) => {
                tell(format_args!("on /dev/kvm, Linux {}, which can pre-fault", linux.release()));
                Backend::Kvm(linux)
            }
            Err(reason) => {
                tell(format_args!("on the software KVM, as Linux {profile}, since {reason}"));
                Backend::Soft(Soft::new(profile))
            }
        }),
    }
}

/// `/dev/kvm` if it can pre-fault, else the reason why not.
fn pre_faulting() -> Result<Linux, String> {
    let linux = Linux::open().map_err(|error| unopened(&error))?;
    let mut machine =
        Machine::new(&linux, 1).map_err(|error| format!("/dev/kvm makes no machine: {error}"))?;
    let lent = machine.lend();
    match lent.vcpus.first_mut().map(|vcpu| probe::pre_fault(lent.vm, vcpu)) {
        Some(support) if support.is_supported() => Ok(linux),
        Some(support) => Err(format!("/dev/kvm can't pre-fault: {support}")),
        None => Err("/dev/kvm makes no vCPU".to_owned()),
    }
}

/// Why `/dev/kvm` can't be opened, and what to do about it.
pub(crate) fn unopened(error: &MachineError) -> String {
    match error {
        MachineError::Open { errno, .. } => format!("{error}; {}", remedy(*errno)),
        other => other.to_string(),
    }
}

/// What helps against an errno of opening `/dev/kvm`.
pub(crate) fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            "load kvm_intel or kvm_amd, and enable virtualization in the firmware or, in a virtual machine, on its host"
        }
        Errno::ACCESS | Errno::PERM => "run `sudo setfacl -m u:$USER:rw /dev/kvm` or join the group kvm",
        _ => "see whether the module kvm is loaded and the sandbox passes the device on",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(errno: Errno, expected: &str) {
        let line = unopened(&MachineError::Open { path: "/dev/kvm", errno });
        assert!(line.contains("/dev/kvm") && line.contains(expected), "{line}");
        assert!(line.contains(&format!("os error {}", errno.raw_os_error())), "{line}");
    }

    #[test]
    fn an_unopened_device_is_told_with_errno_and_remedy() {
        check(Errno::NOENT, "load kvm_intel or kvm_amd");
        check(Errno::ACCESS, "setfacl -m u:$USER:rw /dev/kvm");
        check(Errno::MFILE, "sandbox");
    }
}
