//! Which slots have which parts of a guest_memfd.

use std::ops::Range;
use std::sync::{Arc, Weak};

use premap_address::{Gfn, Hva, PAGE_SIZE};
use premap_kvm::Errno;

use super::guest_memfd::File;
use crate::memslots::SlotId;

/// A slot's private memory. It goes when the descriptor is closed, whatever slots there are.
#[derive(Clone, Debug)]
pub(crate) struct PrivateMemory {
    pub(super) file: Weak<File>,
    /// The page of the file that is the slot's first.
    pub(super) first: u64,
}

impl PrivateMemory {
    /// Makes pages present, from the page at an offset in the slot on, and gives the first one's address with what keeps
    /// it there until a mapping is made or refused.
    ///
    /// # Errors
    /// EFAULT: the descriptor was closed. ENOMEM: the host has no memory.
    pub(crate) fn get(&self, offset: u64, pages: u64) -> Result<(Hva, Held), Errno> {
        let file = self.file.upgrade().filter(|file| !file.is_closed()).ok_or(Errno::FAULT)?;
        let first = self.first + offset;
        file.make_present(first, pages)?;
        Ok((file.hva(first), Held(file)))
    }

    /// Whether the descriptor was closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.file.upgrade().is_none_or(|file| file.is_closed())
    }

    /// Says that the slot is gone.
    pub(crate) fn unbind(&self, slot: SlotId) {
        if let Some(file) = self.file.upgrade() {
            file.bindings().retain(|binding| binding.slot != slot);
        }
    }
}

/// Keeps a guest_memfd's memory mapped.
#[derive(Debug)]
pub(crate) struct Held(#[expect(dead_code, reason = "held for its drop")] Arc<File>);

/// A part of a guest_memfd that a slot has.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    pub(super) slot: SlotId,
    /// The slot's first page, in the guest.
    pub(super) base: Gfn,
    /// The file's pages.
    pub(super) pages: Range<u64>,
}

impl Binding {
    /// The guest's pages that lie in these pages of the file.
    pub(super) fn guest_pages(&self, pages: &Range<u64>) -> Option<Range<Gfn>> {
        let (start, end) = (self.pages.start.max(pages.start), self.pages.end.min(pages.end));
        let gfn = |page: u64| Gfn::new(self.base.number() + (page - self.pages.start));
        (start < end).then(|| gfn(start)..gfn(end))
    }
}

/// A byte offset and length as pages.
///
/// # Errors
/// EINVAL: not aligned to 4 KiB, or too far.
pub(super) fn pages_of(offset: u64, bytes: u64) -> Result<Range<u64>, Errno> {
    if !offset.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::INVAL);
    }
    let end = offset.checked_add(bytes).ok_or(Errno::INVAL)?;
    Ok(offset / PAGE_SIZE..end / PAGE_SIZE)
}
