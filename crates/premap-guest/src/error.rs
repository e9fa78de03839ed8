//! What can go wrong with a small machine.

use std::path::PathBuf;

use premap_address::{Gpa, GpaRange};
use premap_kvm::Errno;

use crate::backing::Backing;
use crate::mode::Mode;
use crate::private::VmType;
use crate::touch::Access;

/// Why there is no memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size makes no whole pages.
    #[error("{bytes} bytes of {backing} memory: give a multiple of {page} bytes above 0")]
    Size {
        /// The size asked for.
        bytes: u64,
        /// Of what.
        backing: Backing,
        /// The size of its pages.
        page: u64,
    },
    /// Too few hugetlb pages are free.
    #[error(
        "{needed} hugetlb pages of 2 MiB are needed, {free} are free; `sysctl vm.nr_hugepages={remedy}` adds them"
    )]
    HugetlbPool {
        /// Pages free and not promised to others.
        free: u64,
        /// Pages needed.
        needed: u64,
        /// The pool's size that would do.
        remedy: u64,
    },
    /// There is no temporary file to map.
    #[error(
        "no temporary file of {bytes} bytes in {folder:?}: {errno}; set TMPDIR to a folder that has room for it"
    )]
    TemporaryFile {
        /// Where it was to be.
        folder: PathBuf,
        /// Its length.
        bytes: u64,
        /// What making or filling it gave.
        errno: Errno,
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

/// Names the call that gave an errno.
pub(crate) fn os(what: &'static str) -> impl FnOnce(Errno) -> MemoryError {
    move |errno| MemoryError::Os { what, errno }
}

/// Why a guest did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The guest touched what no memslot backs, or wrote a read-only one.
    #[error(
        "the guest's {access} at gpa {gpa} met no memory (KVM_EXIT_MMIO): no memslot, or a read-only one"
    )]
    Mmio {
        /// Where.
        gpa: Gpa,
        /// How.
        access: Access,
    },
    /// KVM could not get the page behind a touch.
    #[error("the guest touched {bytes:#x} bytes at gpa {gpa} that KVM can't map (KVM_EXIT_MEMORY_FAULT)")]
    MemoryFault {
        /// Where.
        gpa: Gpa,
        /// How much.
        bytes: u64,
        /// Whether it was wanted as private memory.
        private: bool,
    },
    /// The vCPU left the guest for a reason that the guest never gives.
    #[error("the guest left for {reason}, where only KVM_EXIT_HLT was expected")]
    Exit {
        /// KVM's name of the reason, with what it carries.
        reason: String,
    },
    /// This KVM can't put a vCPU into the mode.
    #[error("this KVM has no vCPUs in {mode}: {why}")]
    NoMode {
        /// The mode.
        mode: Mode,
        /// What is missing.
        why: &'static str,
    },
    /// The call that runs or prepares the guest failed.
    #[error("{call} failed: {errno}")]
    Call {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// The guest's own page tables don't reach so far, or it has none.
    #[error("the guest reaches gpa 4 GiB to 512 GiB, with paging on, not {0}")]
    OutOfReach(GpaRange),
}

/// Why a machine can't be made or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The device can't be opened.
    #[error("opening {path} failed: {errno}")]
    Open {
        /// The device.
        path: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// A call on the machine failed.
    #[error("{call} failed: {errno}")]
    Call {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// This kernel has no VMs of that type.
    #[error("this KVM has no {0} VMs (KVM_CAP_VM_TYPES)")]
    NoVmType(VmType),
    /// There is no such slot.
    #[error("the machine has no memslot {0}")]
    NoSlot(u32),
    /// The machine's own memory, or a slot's, can't be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A guest did not come to its end.
    #[error("vCPU {vcpu}: {error}")]
    Guest {
        /// Whose.
        vcpu: usize,
        /// Why.
        error: GuestError,
    },
    /// The host gives no thread for each vCPU.
    #[error(
        "{}, and after {started} the host gave no more ({errno}); use fewer vCPUs, or raise the limit of threads: \
         `ulimit -u`, or pids.max of the cgroup",
        if *wanted == 1 { "1 vCPU needs a thread".to_owned() } else { format!("{wanted} vCPUs need a thread each") }
    )]
    Threads {
        /// How many could be started.
        started: usize,
        /// How many were wanted.
        wanted: usize,
        /// What starting the next one gave.
        errno: Errno,
    },
    /// This kernel does not count what is asked for.
    #[error("this KVM has no statistic {0}; Linux 5.14 or later has it")]
    NoStatistic(&'static str),
}

/// Names the machine's call that gave an errno.
pub(crate) fn call(call: &'static str) -> impl FnOnce(Errno) -> MachineError {
    move |errno| MachineError::Call { call, errno }
}
