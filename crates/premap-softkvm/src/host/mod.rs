//! Getting pages that the host does not have yet.
//!
//! Linux's KVM looks a page up in the host's page tables and is told of changes by an MMU notifier. A user-space KVM has
//! neither, so it asks the kernel: `premap-address-space` has the questions. An answer is true only for the moment it was
//! given. Who uses one must hold an invalidation sequence number taken *before* it was asked for, and check that number
//! before acting on the answer (see `notifier`).
//!
//! Getting a page is `MADV_POPULATE_READ` or `_WRITE`: what a touch would do, with an errno where a touch would be a signal.

mod getter;
mod populate;

pub(crate) use getter::Getter;
pub(crate) use populate::{Failure, populate};
pub(crate) use premap_address_space::{AddressSpace, Exclusivity, Run, State};

/// How a page is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    Read,
    Write,
}
