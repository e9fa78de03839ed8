//! TDs: KVM's side of TDX, on a modelled TDX module.
//!
//! A TD's private memory is the module's: the host gives it pages and can't see them any more. What KVM keeps is a *mirror*
//! of the Secure-EPT, in which a leaf is present only once the module has accepted the page.
//!
//! ```text
//!   KVM_PRE_FAULT_MEMORY   KVM_TDX_INIT_MEM_REGION    an exit of the guest
//!            |                        |                       |
//!            v                        v                       v
//!         reserve ------------>      add                   augment
//!         SEPT.ADD                PAGE.ADD, MR.EXTEND      SEPT.ADD, PAGE.AUG
//!            +------------------------+-----------------------+
//!                                     v
//!                        mirror (premap-mmu) -> premap-tdx-module
//! ```
//!
//! How a page comes in before the TD is finalized is the profile's affair (`Building` in `profile`): the
//! proposal reserves ahead and hands the source on as an argument; the kernels before and after it build tables and add
//! the page at once, with the source in a field of the VM, one thread at a time.

mod build;
mod errors;
mod guest;
mod host;
mod ioctls;
mod memory;
mod mirror;
mod reservations;
mod shards;
mod teardown;
#[cfg(test)]
mod tests;

pub(crate) use build::Td;
use std::sync::{Mutex, MutexGuard, PoisonError};

use premap_address::{PAGE_SIZE, PageSize};

pub use guest::Accepted;
pub(crate) use guest::{SHARED_BIT, TdCpu};
pub use host::TdxHost;

/// The bytes of a page, as an array has them.
const PAGE_BYTES: usize = 4096;
/// The content of a page.
type Page = [u8; PAGE_BYTES];
/// The pages of a block of 2 MiB, likewise.
const BLOCK_PAGES: usize = 512;
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE && BLOCK_PAGES as u64 == PageSize::Size2M.pages());

/// Takes a lock. What it guards is whole at every moment at which a holder can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
