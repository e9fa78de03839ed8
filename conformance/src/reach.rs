//! Which kernels are in reach, and what to say of those that are not.

use std::fs;

use premap_guest::{Kernel, Linux};
use premap_kvm::probe::{self, PreFault};
use premap_softkvm::Tdp;

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

/// `/dev/kvm`, if it shadows its guests' page tables.
#[must_use]
pub fn linux_without_tdp() -> Option<Linux> {
    let (kernel, found) = linux()?;
    if found != PreFault::ShadowPaging {
        eprintln!("skipped: this /dev/kvm does not shadow its guests' page tables ({found})");
        return None;
    }
    Some(kernel)
}

/// Whether the kernel's second stage is made by the TDP MMU: `tdp_mmu=0` leaves it to the shadow MMU.
#[must_use]
pub fn has_tdp_mmu<K: Kernel>() -> bool {
    K::NAME != Linux::NAME || linux_tdp_mmu()
}

/// The most pages that one fault maps. The shadow MMU maps those around that the host has present.
#[must_use]
pub fn pages_a_fault<K: Kernel>() -> u64 {
    if has_tdp_mmu::<K>() { 1 } else { 8 }
}

/// How this `/dev/kvm` has its second stage, as the software KVM is told.
#[must_use]
pub fn tdp_of(found: PreFault) -> Tdp {
    match found {
        PreFault::ShadowPaging => Tdp::Off,
        _ if !linux_tdp_mmu() => Tdp::WithoutTdpMmu,
        _ => Tdp::On,
    }
}

fn linux_tdp_mmu() -> bool {
    fs::read_to_string("/sys/module/kvm/parameters/tdp_mmu").map_or(true, |value| value.trim() != "N")
}

/// The first two numbers of a kernel's release, or of a profile's name.
#[must_use]
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers =
        release.split(|digit: char| !digit.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    numbers.next().flatten().zip(numbers.next().flatten())
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
