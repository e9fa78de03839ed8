//! Private memory, the same on every kernel: what kinds of VM there are, and the calls that give one its private memory.
// UNSAFETY: declares an unsafe method; no unsafe code runs here.
#![expect(unsafe_code, reason = "memory that guests write is the caller's promise")]

use std::fmt;

use premap_kvm::abi::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use premap_kvm::{Errno, Vm};
use rustix::fs::FallocateFlags;

/// What kind of VM a machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VmType {
    /// `KVM_X86_DEFAULT_VM`: all memory is shared with the VMM.
    #[default]
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: pages can be private, without hardware that enforces it.
    SoftwareProtected,
}

impl fmt::Display for VmType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::SoftwareProtected => "software-protected",
        })
    }
}

/// A VM's ioctls for private memory.
pub trait PrivateMemory: Vm {
    /// What [`create_guest_memfd`](Self::create_guest_memfd) makes.
    type GuestMemfd: GuestMemfd;

    /// `KVM_CREATE_GUEST_MEMFD`.
    ///
    /// # Errors
    /// EINVAL for unknown flags, or a size that makes no pages.
    fn create_guest_memfd(&self, request: &kvm_create_guest_memfd) -> Result<Self::GuestMemfd, Errno>;

    /// `KVM_SET_USER_MEMORY_REGION2`: with `KVM_MEM_GUEST_MEMFD` a slot has private memory beside its shared one.
    ///
    /// # Errors
    /// Those of [`set_user_memory_region`](Vm::set_user_memory_region); EBADF for no descriptor; EINVAL for one that is no
    /// guest_memfd of this VM, or a part of it that can't be had.
    ///
    /// # Safety
    /// What `set_user_memory_region` asks for.
    unsafe fn set_user_memory_region2(&self, region: &kvm_userspace_memory_region2) -> Result<(), Errno>;

    /// `KVM_SET_MEMORY_ATTRIBUTES`: makes pages private or shared.
    ///
    /// # Errors
    /// EINVAL for flags, attributes that this VM lacks, and what is no range of pages. ENOTTY where KVM has no attributes.
    fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> Result<(), Errno>;
}

/// The descriptor of private memory. Dropping it closes it.
pub trait GuestMemfd {
    /// Its number.
    fn number(&self) -> u32;

    /// The number of its inode.
    ///
    /// # Errors
    /// What `fstat(2)` gives.
    fn inode(&self) -> Result<u64, Errno>;

    /// `fallocate(2)`: makes pages present, or gives them back. Offset and length are in bytes.
    ///
    /// # Errors
    /// EOPNOTSUPP for a mode that a guest_memfd lacks, EINVAL for what is no range of its pages, EFBIG where it wraps.
    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno>;

    /// Does with the descriptor what can be done with most files.
    ///
    /// # Errors
    /// Always: whatever reaches the content is refused.
    fn attempt(&self, operation: FileOperation) -> Result<(), Errno>;
}

/// What can be done with most files, and not with a guest_memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileOperation {
    /// `read(2)` of a page.
    Read,
    /// `write(2)` of a page.
    Write,
    /// `mmap(2)` of a page, shared.
    Map,
    /// `ftruncate(2)` to a page.
    Truncate,
}

impl FileOperation {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Map, Self::Truncate];
}
