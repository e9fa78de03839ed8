//! What can go wrong with a Linux guest.

use premap_guest::{MachineError, MemoryError};
use premap_kvm::Errno;

/// Why an image can't be booted, on any machine or on one of this size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no bzImage's header.
    #[error("not a bzImage; give the file that boot loaders load, as /boot/vmlinuz, not vmlinux")]
    NotBzImage,
    /// The file is shorter than its header says.
    #[error("a bzImage cut short: {bytes} bytes of {expected}")]
    Truncated {
        /// The file's length.
        bytes: u64,
        /// The length that its header speaks of.
        expected: u64,
    },
    /// The kernel has no 64-bit entry.
    #[error("a kernel without a 64-bit entry; give one for x86-64, Linux 3.8 or later")]
    No64BitEntry,
    /// The kernel wants memory that no machine has.
    #[error(
        "a kernel that would unpack itself into {bytes:#x} bytes at {address:#x}, where no machine has memory; the file is \
         damaged, give another"
    )]
    Unpacked {
        /// Where it would be.
        address: u64,
        /// How much it would take there.
        bytes: u64,
    },
    /// The command line has a byte that the kernel would take for its end.
    #[error("the command line has a NUL in it")]
    NulInCommandLine,
    /// The command line is longer than the kernel takes.
    #[error("the command line has {length} bytes, and this kernel takes {limit}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The kernel does not fit.
    #[error("this kernel needs {needed} bytes of memory to unpack itself, and there are {bytes}")]
    Memory {
        /// The guest's memory.
        bytes: u64,
        /// What it would take.
        needed: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error("an initramfs of {bytes} bytes, and memory has room for {room} beside the kernel")]
    Initrd {
        /// Its length.
        bytes: u64,
        /// What would fit.
        room: u64,
    },
}

/// Why there is no guest, or why it did not come to an end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinuxGuestError {
    /// The image does not fit the machine.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine can't be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// More vCPUs than the machine's ACPI tables can name, or none.
    #[error("{0} vCPUs; this machine has 1 to 254")]
    Vcpus(u32),
    /// A vCPU left the guest for a reason that it should not.
    #[error("vCPU {vcpu} left the guest: {reason}")]
    Vcpu {
        /// Which.
        vcpu: usize,
        /// KVM's name of the reason.
        reason: String,
    },
    /// The operating system refused.
    #[error("{what} failed: {errno}")]
    Os {
        /// The call.
        what: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

impl From<MemoryError> for LinuxGuestError {
    fn from(error: MemoryError) -> Self {
        Self::Machine(error.into())
    }
}

/// Names a call of KVM's that failed.
pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> LinuxGuestError {
    move |error| MachineError::Call { call, errno: premap_guest::errno(error) }.into()
}
