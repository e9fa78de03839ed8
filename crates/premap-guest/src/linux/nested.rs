//! An L2 guest on AMD's SVM, without an L1 that ever runs: KVM is told that the vCPU is in the middle of one.
//!
//! `KVM_SET_NESTED_STATE` takes the control block that L1 would have given to VMRUN (vmcb12), with L1's own registers in
//! its save area. L1 intercepts VMRUN alone, which SVM demands: so a HLT of L2 goes past it, to user space.
//!
//! Layout: AMD64 Architecture Programmer's Manual, volume 2, appendix B.

use kvm_bindings::nested::{KvmNestedStateBuffer, kvm_nested_state__data, kvm_svm_nested_state_data};
use kvm_bindings::{KVM_STATE_NESTED_SVM_VMCB_SIZE, kvm_sregs, kvm_svm_nested_state_hdr};
use kvm_ioctls::VcpuFd;
use premap_address::Gpa;

/// EFER.SVME: without it there is no guest mode.
pub(super) const EFER_SVME: u64 = 1 << 12;

/// `KVM_STATE_NESTED_*`, as wide as the fields that they go into.
const GUEST_MODE: u16 = 1;
const GIF_SET: u16 = 1 << 8;
const FORMAT_SVM: u16 = 1;

const VMCB: usize = KVM_STATE_NESTED_SVM_VMCB_SIZE as usize;
const NESTED_CTL_NP_ENABLE: u64 = 1;
const INTERCEPT_VMRUN: u32 = 1;
/// Any but 0, which is the host's.
const ASID: u32 = 1;

// In the control area.
const INTERCEPTS_4: usize = 0x010;
const GUEST_ASID: usize = 0x058;
const NESTED_CTL: usize = 0x090;
const NESTED_CR3: usize = 0x0b0;
// In the save area.
const EFER: usize = 0x4d0;
const CR4: usize = 0x548;
const CR3: usize = 0x550;
const CR0: usize = 0x558;
const RFLAGS: usize = 0x570;

/// Makes the vCPU, whose registers are L2's already, run under an L1 that has the registers `l1`. With `tables` L1 uses
/// nested paging under them; else L2's own page tables are the ones that the processor walks.
pub(super) fn enter(fd: &VcpuFd, l1: &kvm_sregs, tables: Option<Gpa>) -> Result<(), kvm_ioctls::Error> {
    let mut vmcb12 = [0; VMCB];
    let mut put = |at: usize, bytes: &[u8]| vmcb12[at..at + bytes.len()].copy_from_slice(bytes);
    put(INTERCEPTS_4, &INTERCEPT_VMRUN.to_le_bytes());
    put(GUEST_ASID, &ASID.to_le_bytes());
    if let Some(tables) = tables {
        put(NESTED_CTL, &NESTED_CTL_NP_ENABLE.to_le_bytes());
        put(NESTED_CR3, &tables.raw().to_le_bytes());
    }
    // Bit 1 of RFLAGS is always set.
    for (at, value) in [(EFER, l1.efer), (CR4, l1.cr4), (CR3, l1.cr3), (CR0, l1.cr0), (RFLAGS, 2)] {
        put(at, &value.to_le_bytes());
    }
    let mut state = state(GUEST_MODE | GIF_SET);
    state.data = kvm_nested_state__data { svm: kvm_svm_nested_state_data { vmcb12 } };
    fd.set_nested_state(&state)
}

/// Makes the vCPU an ordinary one again, with L1's registers.
pub(super) fn leave(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    fd.set_nested_state(&state(GIF_SET))
}

fn state(flags: u16) -> KvmNestedStateBuffer {
    let mut state = KvmNestedStateBuffer::empty();
    (state.flags, state.format) = (flags, FORMAT_SVM);
    // Where L1 keeps its block: any page that it can address, since nothing exits to it.
    state.hdr.svm = kvm_svm_nested_state_hdr { vmcb_pa: 0 };
    state
}
