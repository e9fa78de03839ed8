//! Puts a vCPU on `/dev/kvm` into its modes and out of them.

use kvm_bindings::{CpuId, KVM_VCPUEVENT_VALID_SMM, kvm_segment, kvm_sregs};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use premap_address::Gpa;

use super::control::{NESTED_PML4, PML4, enter_long_mode};
use super::nested::{self, EFER_SVME};
use super::vcpu::failed;
use crate::error::GuestError;
use crate::mode::Mode;

/// What this host offers beyond what every KVM does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    system_management: bool,
    svm: bool,
    nested_paging: bool,
}

impl Abilities {
    /// What KVM says, and the CPUID that it supports.
    pub(super) fn of(kvm: &Kvm, cpuid: &CpuId) -> Self {
        const ECX_SVM: u32 = 1 << 2;
        const EDX_NP: u32 = 1;
        let leaf = |function| cpuid.as_slice().iter().find(|entry| entry.function == function);
        let svm = leaf(0x8000_0001).is_some_and(|entry| entry.ecx & ECX_SVM != 0);
        Self {
            system_management: kvm.check_extension(Cap::X86Smm),
            svm,
            nested_paging: svm && leaf(0x8000_000a).is_some_and(|entry| entry.edx & EDX_NP != 0),
        }
    }

    fn check(self, mode: Mode) -> Result<(), GuestError> {
        let (has, why) = match mode {
            Mode::Paging | Mode::PagingOff => (true, ""),
            Mode::SystemManagement => (self.system_management, "KVM_CAP_X86_SMM is 0"),
            Mode::NestedPaging => (
                self.nested_paging,
                "its CPUID has no nested paging of AMD's: kvm_amd with nested=1 and npt=1 has",
            ),
            Mode::NestedShadow => (self.svm, "its CPUID has no SVM: kvm_amd with nested=1 has"),
        };
        if has { Ok(()) } else { Err(GuestError::NoMode { mode, why }) }
    }
}

/// Puts the vCPU from one mode into another. Where that fails it is in neither, and can be put into any.
pub(super) fn change(fd: &VcpuFd, abilities: Abilities, from: Mode, to: Mode) -> Result<(), GuestError> {
    abilities.check(to)?;
    match from {
        Mode::Paging | Mode::PagingOff => {}
        Mode::SystemManagement => set_system_management(fd, false)?,
        Mode::NestedPaging | Mode::NestedShadow => {
            nested::leave(fd).map_err(failed("KVM_SET_NESTED_STATE"))?;
        }
    }
    if to == Mode::SystemManagement {
        set_system_management(fd, true)?;
    }
    let sregs = set_registers(fd, to)?;
    let nested = |tables| nested::enter(fd, &sregs, tables).map_err(failed("KVM_SET_NESTED_STATE"));
    match to {
        Mode::Paging | Mode::PagingOff | Mode::SystemManagement => Ok(()),
        Mode::NestedPaging => nested(Some(Gpa::new(NESTED_PML4))),
        Mode::NestedShadow => nested(None),
    }
}

/// Gives the vCPU the registers of its mode.
pub(super) fn set_registers(fd: &VcpuFd, mode: Mode) -> Result<kvm_sregs, GuestError> {
    let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    match mode {
        Mode::PagingOff => leave_paging(&mut sregs),
        Mode::Paging | Mode::SystemManagement => enter_long_mode(&mut sregs, Gpa::new(PML4)),
        Mode::NestedPaging | Mode::NestedShadow => {
            enter_long_mode(&mut sregs, Gpa::new(PML4));
            sregs.efer |= EFER_SVME;
        }
    }
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    Ok(sregs)
}

/// 32-bit protected mode with flat segments and no paging.
fn leave_paging(sregs: &mut kvm_sregs) {
    const CR0_PG: u64 = 1 << 31;
    enter_long_mode(sregs, Gpa::new(0));
    sregs.cr0 &= !CR0_PG;
    (sregs.cr4, sregs.efer) = (0, 0);
    sregs.cs = kvm_segment { l: 0, db: 1, ..sregs.cs };
}

fn set_system_management(fd: &VcpuFd, inside: bool) -> Result<(), GuestError> {
    let mut events = fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    events.flags |= KVM_VCPUEVENT_VALID_SMM;
    events.smi.smm = inside.into();
    fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
}
