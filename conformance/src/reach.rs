//! Which kernels are in reach, and what to say of those that are not.

use premap_guest::{Kernel, Linux};
use premap_kvm::probe::{self, PreFault};

/// `/dev/kvm`, with what its probe says, if it can be opened.
#[must_use]
pub fn linux() -> Option<(Linux, PreFault)> {
    let kernel = match Linux::open() {
        Ok(kernel) => kernel,
        Err(error) => {
            skip(&error.to_string());
            return None;
        }
    };
    let vm = kernel.create_vm().expect("a VM can be made where /dev/kvm can be opened");
    let mut vcpu = kernel.create_vcpu(&vm, 0).expect("a VM can have a vCPU");
    let found = probe::pre_fault(&vm, &mut vcpu);
    Some((kernel, found))
}

/// `/dev/kvm`, if it can pre-fault.
#[must_use]
pub fn linux_with_pre_fault() -> Option<Linux> {
    let (kernel, found) = linux()?;
    if !found.is_supported() {
        skip(&found.to_string());
        return None;
    }
    Some(kernel)
}

/// Says what a kernel lacks by the way it was built, so that a test does not run on it. No failure in the lab either: its
/// usual kernels are as Debian builds them.
pub fn tell_lack(what: &str) {
    eprintln!("skipped: {what}");
}

/// Says why a test does not run here. In the lab, which exists so that it can, that is a failure.
///
/// # Panics
/// Where `PREMAP_LAB=1` says that this is the lab.
pub fn skip(why: &str) {
    assert!(std::env::var_os("PREMAP_LAB").is_none_or(|value| value != "1"), "must run in the lab: {why}");
    eprintln!("skipped: {why}");
}
