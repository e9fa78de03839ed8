//! The guest's side: what a vCPU does between VP.ENTER and its exit.
//!
//! A guest reads and writes its private memory by a walk of the Secure-EPT, and accepts pages that were given to it pending.
//! What hardware would end with an exit to the host comes back as [`Stop::Exit`]; the guest's program returns from VP.ENTER
//! with it, the host does what is needed, and enters again.

mod accept;
mod access;

use premap_address::Gpa;
use premap_tdx::Digest;

use crate::Module;
use crate::operand::Level;
use crate::sept::EntryState;
use crate::status::Status;
use crate::sync::Ordering;
use crate::td::{Td, Vcpu};

/// A running vCPU's side of things.
#[derive(Debug)]
pub struct Guest<'m> {
    module: &'m Module,
    td: &'m Td,
    vcpu: &'m Vcpu,
}

/// What the guest did when an EPT violation ended its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It read.
    Read,
    /// It wrote.
    Write,
    /// It accepted a page.
    Accept,
}

/// An EPT violation, which is the host's to resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    /// The address; of an ACCEPT, the page's.
    pub gpa: Gpa,
    /// What the guest did.
    pub cause: Cause,
    /// The level that an ACCEPT was for; 0 of an access.
    pub asked: Level,
    /// The level of the entry at which the walk ended.
    pub level: Level,
    /// The state of that entry.
    pub state: EntryState,
}

/// Why the guest can't go on as it wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// The TDCALL's status, which the guest sees.
    #[error("{0}")]
    Status(Status),
    /// The vCPU exits.
    #[error("EPT violation at gpa {} ({:?})", .0.gpa, .0.cause)]
    Exit(EptViolation),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl<'m> Guest<'m> {
    pub(crate) const fn new(module: &'m Module, td: &'m Td, vcpu: &'m Vcpu) -> Self {
        Self { module, td, vcpu }
    }

    /// The vCPU's number in the TD (TDG.VP.INFO).
    #[must_use]
    pub fn vcpu_index(&self) -> u64 {
        self.vcpu.index.load(Ordering::Relaxed)
    }

    /// RCX at the vCPU's first instruction: what VP.INIT was given.
    #[must_use]
    pub fn initial_rcx(&self) -> u64 {
        self.vcpu.initial_rcx.load(Ordering::Relaxed)
    }

    /// The vCPU's x2APIC id.
    #[must_use]
    pub fn x2apic_id(&self) -> u64 {
        self.vcpu.x2apic_id.load(Ordering::Relaxed)
    }

    /// The MRTD as a report tells it (TDG.MR.REPORT).
    #[must_use]
    pub fn mrtd(&self) -> Digest {
        self.td.mrtd()
    }
}
