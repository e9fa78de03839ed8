//! The guest touches memory: the table is walked and the bytes behind it are read or written.
//!
//! The "host-physical frame" in a leaf is the host-*virtual* frame, `hva >> 12`, since that is the memory that a user-space
//! process can reach. Everything else is as hardware has it: the walk checks the permission and sets Accessed and Dirty, and
//! from the walk to the end of the access the vCPU holds a view of the table, which every TLB flush waits for.
// UNSAFETY: the guest's loads and stores, at host addresses found in the table.
#![expect(unsafe_code, reason = "the guest's own loads and stores")]

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use premap_address::Gpa;
use premap_mmu::{Access, AccessFault, Npt};

use crate::roots::Table;

/// An aligned word of guest memory, touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Load,
    Store(u64),
}

impl Operation {
    pub(crate) fn access(self) -> Access {
        match self {
            Self::Load => Access::Read,
            Self::Store(_) => Access::Write,
        }
    }
}

/// Does what the guest's instruction does, if the table lets it, and gives the word as it is then.
///
/// # Panics
/// The address is not a multiple of 8.
pub(crate) fn perform(table: &Table, gpa: Gpa, operation: Operation) -> Result<u64, AccessFault<Npt>> {
    assert!(gpa.raw().is_multiple_of(8), "{gpa} is no word's address");
    let view = table.view();
    let mapping = view.access(gpa, operation.access())?;
    let address = mapping.translate(gpa).ok_or(AccessFault::NotMapped)?;
    let word = usize::try_from(address.raw()).map_err(|_| AccessFault::NotMapped)?;
    // SAFETY: the leaf that permits this access was made by the fault path, from a page that the host had present with
    // that permission at an address inside a memslot. Who set the slot promised (`Vm::set_user_memory_region`) that the
    // memory is the guest's to read and write at any moment, and (`SoftVm`) that it stays mapped unless the VM's notifier is
    // told first. Telling it takes the leaf away and then waits for every view, ours included, so the page is there until
    // `view` is dropped below. The pointer is not null, since no leaf maps frame 0 of user space, and aligned as asserted.
    // Other vCPUs and the VMM touch the same memory, hence an atomic.
    let word = unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(word)) };
    let value = match operation {
        Operation::Load => word.load(Ordering::Relaxed),
        Operation::Store(value) => {
            word.store(value, Ordering::Relaxed);
            value
        }
    };
    drop(view);
    Ok(value)
}
