//! The VMM's own descriptors, as the library uses them: duplicated for a while, checked, and never kept.
// UNSAFETY: borrows descriptors by number, and asks the kernel about them.
#![expect(unsafe_code, reason = "descriptors that belong to the VMM")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use premap_kvm::abi::KVM_GET_STATS_FD;
use premap_kvm::{Errno, Stats};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

/// `KCMP_FILE`
const KCMP_FILE: libc::c_int = 0;

/// What a descriptor must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Vm,
    Vcpu,
}

/// Duplicates a descriptor of the VMM's, if it still is what it was taken for. The VMM may close its own meanwhile.
///
/// # Errors
/// EBADF where it is closed, or something else by now.
pub(crate) fn duplicate(fd: RawFd, role: Role) -> Result<OwnedFd, Errno> {
    let own = duplicate_any(fd)?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", own.as_raw_fd())).map_err(|_| Errno::BADF)?;
    let link = link.to_string_lossy();
    let name = match role {
        Role::Vm => "anon_inode:kvm-vm",
        Role::Vcpu => "anon_inode:kvm-vcpu",
    };
    if link.starts_with(name) { Ok(own) } else { Err(Errno::BADF) }
}

/// Whether this process has a VM or a vCPU at this number.
pub(crate) fn is_open(fd: RawFd) -> bool {
    [Role::Vm, Role::Vcpu].into_iter().any(|role| duplicate(fd, role).is_ok())
}

/// Duplicates a descriptor, whatever it is.
///
/// # Errors
/// EBADF where it is closed.
pub(crate) fn duplicate_any(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the number is not -1, and is looked at in this one call only: the kernel says EBADF if it is closed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 0)
}

/// Finds which of `known` is the same open file as `fd`: the VMM may have duplicated a descriptor.
pub(crate) fn same_file(fd: RawFd, known: &[RawFd]) -> Option<RawFd> {
    let process = std::process::id();
    let same = |other: RawFd| {
        // SAFETY: kcmp compares two descriptors by number, and reads and writes no memory of ours.
        unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, fd, other) }
    };
    let results: Vec<_> = known.iter().map(|other| (*other, same(*other))).collect();
    let found = results.iter().find(|(_, result)| *result == 0);
    // A kernel without kcmp can't tell, and with one candidate need not.
    found.or(results.first().filter(|(_, result)| *result < 0 && results.len() == 1)).map(|(other, _)| *other)
}

/// What a vCPU's registers say of how it begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) rbx: u64,
    pub(crate) rsi: u64,
    pub(crate) rip: u64,
    pub(crate) cs_base: u64,
}

impl Registers {
    /// Reads them. The vCPU must not be in the guest: the call would wait until it leaves.
    ///
    /// # Errors
    /// The kernel's errno.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn read(vcpu: impl AsFd) -> Result<Self, Errno> {
        use premap_kvm::abi::{KVM_GET_REGS, KVM_GET_SREGS, kvm_regs, kvm_sregs};
        use rustix::ioctl::Getter;

        // SAFETY: KVM_GET_REGS writes one kvm_regs, for which the getter has room.
        let regs = unsafe { ioctl(&vcpu, Getter::<KVM_GET_REGS, kvm_regs>::new()) }?;
        // SAFETY: KVM_GET_SREGS writes one kvm_sregs, for which the getter has room.
        let sregs = unsafe { ioctl(&vcpu, Getter::<KVM_GET_SREGS, kvm_sregs>::new()) }?;
        Ok(Self { rbx: regs.rbx, rsi: regs.rsi, rip: regs.rip, cs_base: sregs.cs.base })
    }

    /// Other machines' vCPUs are not asked.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn read(_: impl AsFd) -> Result<Self, Errno> {
        Err(Errno::NOSYS)
    }

    /// Whether the vCPU is where a processor begins after a reset.
    pub(crate) fn are_at_reset(&self) -> bool {
        (self.cs_base, self.rip) == (0xffff_0000, 0xfff0)
    }
}

/// Reads memory of this process, whatever is there: the kernel says EFAULT where nothing is.
///
/// # Errors
/// The kernel's errno, or EFAULT where it gave less.
pub(crate) fn read_own_memory(at: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0_u8; len];
    let start = usize::try_from(at).map_err(|_| Errno::FAULT)?;
    let from = libc::iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: len };
    let to = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    // SAFETY: the kernel writes at most `len` bytes to `bytes`, which has room for them, and checks what it reads.
    let count = unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    match usize::try_from(count) {
        Ok(count) if count == len => Ok(bytes),
        Ok(_) => Err(Errno::FAULT),
        Err(_) => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// A vCPU's counters, readable while it runs: asking the vCPU itself would wait until it leaves the guest.
#[derive(Debug)]
pub(crate) struct Counters(File);

impl Counters {
    /// Opens them.
    ///
    /// # Errors
    /// ENOTTY on kernels before 5.14.
    pub(crate) fn open(vcpu: impl AsFd) -> Result<Self, Errno> {
        // SAFETY: KVM_GET_STATS_FD takes no argument and gives a new descriptor.
        let number = unsafe { ioctl(vcpu, GetStatsFd) }?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(number) })))
    }

    /// Reads them.
    pub(crate) fn read(&self) -> Option<Stats> {
        let mut bytes = vec![0; 64 << 10];
        let count = self.0.read_at(&mut bytes, 0).ok()?;
        Stats::parse(&bytes[..count]).ok()
    }
}

struct GetStatsFd;

// SAFETY: the opcode takes no argument, no memory is behind it, and the output is the return value alone.
unsafe impl Ioctl for GetStatsFd {
    type Output = RawFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        KVM_GET_STATS_FD
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut std::ffi::c_void) -> Result<RawFd, Errno> {
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_something_else_is_refused() {
        let file = File::open("/proc/self/status").unwrap();
        for role in [Role::Vm, Role::Vcpu] {
            assert_eq!(duplicate(file.as_raw_fd(), role).unwrap_err(), Errno::BADF);
            assert_eq!(duplicate(-1, role).unwrap_err(), Errno::BADF);
        }
    }

    #[test]
    fn duplicates_are_found_among_others() {
        let files: Vec<_> = (0..3).map(|_| File::open("/proc/self/status").unwrap()).collect();
        let numbers: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let copy = files[1].try_clone().unwrap();
        let found = same_file(copy.as_raw_fd(), &numbers);
        // Without kcmp nothing can be said of three candidates.
        assert!(found == Some(numbers[1]) || found.is_none(), "{found:?}");
        let other = File::open("/proc/self/status").unwrap();
        assert_eq!(same_file(other.as_raw_fd(), &numbers), None);
    }
}
