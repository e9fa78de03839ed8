//! Operations on private memory.

use std::fs::File;
use std::os::fd::AsRawFd;

use premap_guest::{GuestMemfd, Kernel, Machine, PrivateMemory, VmType};
use premap_kvm::Errno;
use premap_kvm::abi::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use rustix::fs::FallocateFlags;

use crate::fixture::{BASE, PAGE};

/// How many guest_memfds a script can have at a time.
pub(super) const FILES: usize = 2;
/// A number that no descriptor has.
const CLOSED: u32 = 1 << 20;

/// Which descriptor a slot is to have its private memory from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// One of the script's guest_memfds; none where it was not made or is closed.
    Own(usize),
    /// A guest_memfd of another VM.
    OtherVm,
    /// A file of another kind.
    Null,
    /// None.
    Closed,
}

/// An operation on private memory. Addresses are in bytes from [`BASE`], as everywhere in a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateOp {
    /// `KVM_CREATE_GUEST_MEMFD`. What `file` was before is closed.
    Create {
        /// What the script calls it.
        file: usize,
        /// Its size.
        bytes: u64,
        /// The ioctl's flags; none are defined.
        flags: u64,
    },
    /// `close(2)` of a guest_memfd.
    Close {
        /// Which.
        file: usize,
    },
    /// `fallocate(2)` on a guest_memfd.
    Allocate {
        /// Which.
        file: usize,
        /// `FALLOC_FL_*`.
        mode: u32,
        /// From where in the file, in bytes.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// `KVM_SET_USER_MEMORY_REGION2`.
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
        /// Where its private memory comes from.
        from: Descriptor,
        /// From where on in that file, in bytes.
        offset: u64,
    },
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    Attributes {
        /// From where.
        gpa: u64,
        /// How much.
        bytes: u64,
        /// `KVM_MEMORY_ATTRIBUTE_*`.
        attributes: u64,
        /// The ioctl's flags; none are defined.
        flags: u64,
    },
}

/// The descriptors that a script has.
pub(super) struct Descriptors<K: Kernel> {
    own: [Option<File_<K>>; FILES],
    /// Made when first asked for. The file is closed before its VM.
    other: Option<(File_<K>, K::Vm)>,
    null: File,
}

type File_<K> = <<K as Kernel>::Vm as PrivateMemory>::GuestMemfd;

impl<K: Kernel> Descriptors<K> {
    pub(super) fn new() -> Self {
        let null = File::open("/dev/null").expect("/dev/null can be opened");
        Self { own: [const { None }; FILES], other: None, null }
    }

    /// The number of a descriptor.
    pub(super) fn number(&mut self, kernel: &K, which: Descriptor) -> u32 {
        match which {
            Descriptor::Own(file) => self.own[file].as_ref().map_or(CLOSED, GuestMemfd::number),
            Descriptor::OtherVm => {
                let make = || {
                    let vm = kernel.create_vm_of(VmType::SoftwareProtected).expect("a second VM can be made");
                    let request = kvm_create_guest_memfd { size: 1024 * PAGE, ..Default::default() };
                    (vm.create_guest_memfd(&request).expect("a guest_memfd can be made"), vm)
                };
                self.other.get_or_insert_with(make).0.number()
            }
            Descriptor::Null => self.null.as_raw_fd().unsigned_abs(),
            Descriptor::Closed => CLOSED,
        }
    }

    pub(super) fn create(
        &mut self,
        machine: &Machine<K>,
        file: usize,
        bytes: u64,
        flags: u64,
    ) -> Result<(), Errno> {
        let request = kvm_create_guest_memfd { size: bytes, flags, ..Default::default() };
        // Closed only once there is another, so that numbers do not depend on which were free.
        self.own[file] = Some(machine.vm().create_guest_memfd(&request)?);
        Ok(())
    }

    pub(super) fn close(&mut self, file: usize) -> Result<(), Errno> {
        self.own[file].take().map(drop).ok_or(Errno::BADF)
    }

    pub(super) fn allocate(&self, file: usize, mode: u32, offset: u64, bytes: u64) -> Result<(), Errno> {
        let file = self.own[file].as_ref().ok_or(Errno::BADF)?;
        file.fallocate(FallocateFlags::from_bits_retain(mode), offset, bytes)
    }
}

/// What a slot is asked for.
pub(super) fn region(
    slot: u32,
    flags: u32,
    (gpa, bytes): (u64, u64),
    userspace_addr: u64,
    (number, offset): (u32, u64),
) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot,
        flags,
        guest_phys_addr: BASE.wrapping_add(gpa).raw(),
        memory_size: bytes,
        userspace_addr,
        guest_memfd_offset: offset,
        guest_memfd: number,
        ..Default::default()
    }
}

/// What pages are to be made.
pub(super) fn attributes(gpa: u64, bytes: u64, attributes: u64, flags: u64) -> kvm_memory_attributes {
    kvm_memory_attributes { address: BASE.wrapping_add(gpa).raw(), size: bytes, attributes, flags }
}
