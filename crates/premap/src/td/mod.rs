//! Launching a TDX guest on memory that is mapped ahead.
//!
//! ```text
//!   reserve ------> add + measure ------> finalize ------> map the rest
//!   Secure-EPT,     PAGE.ADD, serial      the MRTD is      PAGE.AUG, in parallel: the guest's
//!   in parallel     by the module's law   fixed            ACCEPT takes no exit
//! ```
//!
//! A KVM that lets memory be pre-faulted before the TD is finalized builds the Secure-EPT in the first phase, on all vCPUs
//! at once, and adding a page then goes straight to PAGE.ADD. Linux 6.16 and later refuse that (EOPNOTSUPP), build the
//! tables as pages are added, and gain from the last phase alone. The same code takes either way: the kernel's answer to
//! the first call decides.
//!
//! The caller makes the VM (`KVM_TDX_INIT_VM`), its vCPUs, its slots with a guest_memfd, and marks the memory private
//! before. It has not been run on TDX hardware.

mod launch;
mod piece;
mod report;

pub use launch::{Launch, LaunchError, LaunchProgress};
pub use piece::Piece;
pub use report::{LaunchReport, Phase, PhaseReport};
