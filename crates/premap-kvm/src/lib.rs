//! KVM as premap sees it: an ABI, two traits whose methods are ioctls, a probe and the binary statistics.
//!
//! ```text
//!      premap (plans, engine)
//!           |  traits Vm, Vcpu: an ABI struct in and out, an errno as error
//!     +-----+----------------+
//!     v                      v
//!  linux::{Vm, Vcpu}     a software KVM
//!  any fd: AsFd
//! ```
//!
//! Nothing above this crate can tell which KVM it talks to. [`linux`] works on any file descriptor, so a VMM keeps the
//! KVM bindings that it has, of whatever version:
//!
//! ```no_run
//! use std::os::fd::{AsRawFd, BorrowedFd};
//!
//! # fn example(vcpu_fd: &impl AsRawFd) {
//! // SAFETY: `vcpu_fd` is borrowed, so the descriptor stays open for as long as `vcpu` lives.
//! let fd = unsafe { BorrowedFd::borrow_raw(vcpu_fd.as_raw_fd()) };
//! let vcpu = premap_kvm::linux::Vcpu::new(fd);
//! # }
//! ```

pub mod abi;
pub mod linux;
pub mod probe;
pub mod stats;
pub mod tdx;
mod traits;

pub use rustix::io::Errno;
pub use stats::Stats;
pub use traits::{Vcpu, Vm};

/// What an ioctl gives: its value, or the errno as the kernel told it.
pub type Result<T> = std::result::Result<T, Errno>;
