//! The guest touches memory: the table is walked and the bytes behind it are read or written.
//!
//! The "host-physical frame" in a leaf is the host-*virtual* frame, `hva >> 12`, since that is the memory that a user-space
//! process can reach. Everything else is as hardware has it: the walk checks the permission and sets Accessed and Dirty, and
//! from the walk to the end of the access the vCPU holds a view of the table, or is in a section of the shadow MMU, for which
//! every TLB flush waits.
//!
//! KVM itself touches guest memory here too: the guest's own page tables.
// UNSAFETY: the guest's loads and stores, at host addresses found in the table.
#![expect(unsafe_code, reason = "the guest's own loads and stores")]

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use premap_address::Gpa;
use premap_mmu::{Access, Mapping, Npt};

use crate::host::Touch;
use crate::loaded::Loaded;
use crate::machine::Machine;
use crate::page::PresentPage;
use crate::shadow::Section;

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

    /// The word that is stored; 0 of a load.
    pub(crate) fn stored(self) -> u64 {
        match self {
            Self::Load => 0,
            Self::Store(value) => value,
        }
    }
}

/// Does what the guest's instruction does, if the root's tables let it, and gives the word as it is then.
///
/// # Panics
/// The address is not a multiple of 8.
pub(crate) fn perform(machine: &Machine, root: &Loaded, address: Gpa, operation: Operation) -> Option<u64> {
    assert!(address.raw().is_multiple_of(8), "{address} is no word's address");
    match root {
        Loaded::Tdp(root) => {
            let view = root.table.view();
            let mapping = view.access(address, operation.access()).ok()?;
            // SAFETY: the leaf permits the access, and `view` is held: a flush that follows the removal of the leaf waits
            // for it.
            let value = unsafe { touch(&mapping, address, operation) };
            drop(view);
            value
        }
        Loaded::Shadow(used) => {
            let section = machine.shadow.enter();
            let mapping = machine.shadow.mmu.access(used.root, address, operation.access())?;
            // SAFETY: as above, with the section in place of the view.
            let value = unsafe { touch(&mapping, address, operation) };
            drop(section);
            value
        }
    }
}

/// Loads or stores the word behind an aligned address.
///
/// # Safety
/// The mapping is a leaf of this VM's that permits the operation, and until this returns no flush is completed that
/// follows its removal.
unsafe fn touch(mapping: &Mapping<Npt>, address: Gpa, operation: Operation) -> Option<u64> {
    let word = usize::try_from(mapping.translate(address)?.raw()).ok()?;
    // SAFETY: the leaf was made by the fault path, from a page that the host had present with that permission at an address
    // inside a memslot. Who set the slot promised (`Vm::set_user_memory_region`) that the memory is the guest's to read and
    // write at any moment, and (`SoftVm`) that it stays mapped unless the VM's notifier is told first. Telling it takes the
    // leaf away and then completes a flush, so the page is there until this returns. The pointer is not null, since no leaf
    // maps frame 0 of user space, and aligned, since the address is. Other vCPUs and the VMM touch the same memory, hence
    // an atomic.
    let word = unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(word)) };
    Some(match operation {
        Operation::Load => word.load(Ordering::Relaxed),
        Operation::Store(value) => {
            word.store(value, Ordering::Relaxed);
            value
        }
    })
}

impl Machine {
    /// The word at an address in a page, for KVM itself to read or write; `None` where what the host said of the page may
    /// not hold any more.
    ///
    /// # Panics
    /// The address is not a multiple of 8.
    pub(crate) fn word<'s>(
        &self,
        section: &'s Section<'_>,
        page: &PresentPage,
        gpa: Gpa,
        touch: Touch,
    ) -> Option<&'s AtomicU64> {
        assert!(gpa.raw().is_multiple_of(8), "{gpa} is no word's address");
        let hva = page.valid(self, touch)?.wrapping_add(gpa.page_offset());
        let word = usize::try_from(hva.raw()).ok().filter(|address| *address != 0)?;
        let _: &Section<'_> = section;
        // SAFETY: the host had the page present, with this permission, at an address inside a memslot, of which `touch`'s
        // argument holds; and no invalidation of it began before `valid` looked. One that begins later waits, before it
        // lets the host change anything, for the end of every section, so of the caller's, which outlives the reference.
        // The slot itself stays while the caller reads the slots, as all who ask the host for its pages do. Not null and
        // aligned as seen above; others touch the same memory, hence an atomic.
        Some(unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(word)) })
    }
}
