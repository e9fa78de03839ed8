//! What a script can do.

use std::fmt;

use premap_guest::{Access, Backing, VmType};

use super::private::PrivateOp;

/// Guest pages that scripts speak of: page 0 is at [`BASE`](crate::fixture::BASE).
pub(super) const WINDOW: u64 = 4096;
/// Pages of host memory that slots can be made of.
pub(super) const ARENA: u64 = 2048;

/// A list of operations on a fresh machine of a type, with two vCPUs and host memory of one backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// What kind of VM it is.
    pub vm_type: VmType,
    /// What the host memory is made of.
    pub backing: Backing,
    /// What is done, in order.
    pub ops: Vec<Op>,
}

/// One operation. Addresses are in bytes from [`BASE`](crate::fixture::BASE) so that unaligned ones can be told; pages are
/// pages of the host memory or of the guest's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `KVM_SET_USER_MEMORY_REGION`: makes, moves, marks or, with no bytes, deletes a slot.
    Slot {
        /// The slot's number.
        slot: u32,
        /// Its address in bytes from the base.
        gpa: u64,
        /// Its length in bytes.
        bytes: u64,
        /// Its first page in the host memory.
        page: u64,
        /// `KVM_MEM_*`.
        flags: u32,
    },
    /// `KVM_PRE_FAULT_MEMORY`.
    PreFault {
        /// On which vCPU.
        vcpu: usize,
        /// From where, in bytes from the base.
        gpa: u64,
        /// How much.
        bytes: u64,
        /// The ioctl's flags; none are defined.
        flags: u64,
    },
    /// The guest touches a page.
    Guest {
        /// On which vCPU.
        vcpu: usize,
        /// Which page of the window.
        page: u64,
        /// How.
        access: Access,
    },
    /// The VMM writes a word at the start of a page of the host memory.
    HostWrite {
        /// Which.
        page: u64,
    },
    /// The VMM reads the word at the start of a page of the host memory.
    HostRead {
        /// Which.
        page: u64,
    },
    /// The VMM makes pages of the host memory present by writing.
    Populate {
        /// From which page.
        page: u64,
        /// How many.
        count: u64,
    },
    /// The VMM gives pages of the host memory back.
    Discard {
        /// From which page.
        page: u64,
        /// How many.
        count: u64,
    },
    /// `KVM_GET_DIRTY_LOG`.
    DirtyLog {
        /// Of which slot.
        slot: u32,
    },
    /// `KVM_CAP_DISABLE_QUIRKS2` with `KVM_X86_QUIRK_SLOT_ZAP_ALL`: deleting a slot keeps the others' mappings.
    KeepMappings,
    /// Something about private memory.
    Private(PrivateOp),
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a {} VM on {} memory:", self.vm_type, self.backing)?;
        self.ops.iter().try_for_each(|op| match op {
            Op::Private(op) => write!(f, "\n    private {op:x?}"),
            op => write!(f, "\n    {op:x?}"),
        })
    }
}
