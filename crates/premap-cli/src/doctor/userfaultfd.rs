//! userfaultfd, by which snapshots are restored on demand: the device, the sysctl and the system call.
// UNSAFETY: opens a userfaultfd and closes it again, to see whether that is allowed.
#![expect(unsafe_code, reason = "a userfaultfd can meddle with memory; this one is only opened")]

use std::fs;

use premap_kvm::Errno;
use rustix::fs::{Access, access};
use rustix::mm::UserfaultfdFlags;

use super::check::{Check, Status};

/// Whether each of the ways to a userfaultfd is open.
struct Ways {
    device: Result<(), Errno>,
    syscall: Result<(), Errno>,
    /// The sysctl's value, empty where there is none.
    unprivileged: String,
}

pub(super) fn check() -> Check {
    // SAFETY: the descriptor is closed at once; no memory was registered with it.
    let opened = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) };
    judge(&Ways {
        device: access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK),
        syscall: opened.map(drop),
        unprivileged: fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default(),
    })
}

fn judge(ways: &Ways) -> Check {
    let told = |way: &Result<(), Errno>| match way {
        Ok(()) => "yes".to_owned(),
        Err(errno) => errno.to_string(),
    };
    let sysctl = match ways.unprivileged.trim() {
        "" => "none",
        value => value,
    };
    let result = format!(
        "/dev/userfaultfd: {}; system call: {}; vm.unprivileged_userfaultfd: {sysctl}",
        told(&ways.device),
        told(&ways.syscall)
    );
    if ways.device.is_ok() || ways.syscall.is_ok() {
        return Check::good("userfaultfd", result);
    }
    let advice = match ways.syscall {
        Err(Errno::NOSYS) => "only needed to restore snapshots: a kernel with CONFIG_USERFAULTFD",
        _ => "only needed to restore snapshots: `sudo setfacl -m u:$USER:rw /dev/userfaultfd`",
    };
    Check::new("userfaultfd", Status::Limited, result).advise(advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_open_way_is_enough() {
        let judge = |device, syscall| judge(&Ways { device, syscall, unprivileged: "0\n".to_owned() });
        assert_eq!(judge(Ok(()), Err(Errno::PERM)).status, Status::Good);
        assert_eq!(judge(Err(Errno::NOENT), Ok(())).status, Status::Good);
        let shut = judge(Err(Errno::ACCESS), Err(Errno::PERM));
        assert_eq!(shut.status, Status::Limited);
        assert!(shut.result.ends_with("vm.unprivileged_userfaultfd: 0"), "{shut:?}");
        assert!(shut.advice.unwrap().contains("setfacl"));
        let absent = judge(Err(Errno::NOENT), Err(Errno::NOSYS)).advice.unwrap();
        assert!(absent.contains("CONFIG_USERFAULTFD"), "{absent}");
    }

    #[test]
    fn this_host_is_judged_without_a_panic() {
        assert!(check().result.contains("/dev/userfaultfd"));
    }
}
