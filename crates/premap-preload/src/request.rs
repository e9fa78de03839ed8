//! KVM's requests, as far as a VM's making shows in them, and what else bears on its memory.

use std::ffi::c_ulong;

use premap_kvm::abi::KVM_SET_USER_MEMORY_REGION;

/// KVM's ioctl group, in bits 8 to 15.
const KVMIO: u32 = 0xae;

const GET_API_VERSION: u32 = 0xae00;
const CREATE_VM: u32 = 0xae01;
const CHECK_EXTENSION: u32 = 0xae03;
const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
const CREATE_VCPU: u32 = 0xae41;
const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
const RUN: u32 = 0xae80;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;

/// A request that the library acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// One of those that a VMM begins with. It has opened `/dev/kvm` just before.
    Begin,
    CreateVm,
    CreateVcpu,
    SetRegion,
    Run,
    /// Of userfaultfd: a handler takes memory over.
    RegisterUserfault,
}

impl Request {
    /// The request behind an ioctl's number, if it is one of these.
    pub(crate) fn of(number: c_ulong) -> Option<Self> {
        // The kernel looks at 32 bits only; callers that pass an int extend its sign.
        let number = u32::try_from(number & 0xffff_ffff).ok()?;
        if number >> 8 & 0xff != KVMIO {
            return (number == UFFDIO_REGISTER).then_some(Self::RegisterUserfault);
        }
        match number {
            RUN => Some(Self::Run),
            GET_API_VERSION | CHECK_EXTENSION | GET_VCPU_MMAP_SIZE => Some(Self::Begin),
            CREATE_VM => Some(Self::CreateVm),
            CREATE_VCPU => Some(Self::CreateVcpu),
            KVM_SET_USER_MEMORY_REGION | SET_USER_MEMORY_REGION2 => Some(Self::SetRegion),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart_in_every_width() {
        let check = |number: c_ulong, expected| assert_eq!(Request::of(number), expected, "{number:#x}");
        check(0xae80, Some(Request::Run));
        check(0xae01, Some(Request::CreateVm));
        check(0xae41, Some(Request::CreateVcpu));
        check(0x4020_ae46, Some(Request::SetRegion));
        check(0x40a0_ae49, Some(Request::SetRegion));
        check(0xffff_ffff_0000_ae00, Some(Request::Begin));
        check(0xc020_aa00, Some(Request::RegisterUserfault));
        check(0xc020_aa04, None);
        check(0x5401, None);
        check(0x4020_ae47, None);
        check(0, None);
    }
}
