//! What a `KVM_SET_USER_MEMORY_REGION2` asks for, and whether it may be had.
//!
//! The checks come in the kernel's order (`kvm_set_memory_region`), so that a request with two faults gets the same errno.

use std::sync::Arc;

use premap_address::{Gpa, Hva, PAGE_SHIFT, PageSize};
use premap_kvm::Errno;
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region2,
};

use crate::private::PrivateMemory;

use super::{DirtyLog, Protection, Slot, SlotId, Snapshot, State};

/// The largest slot, in pages: `KVM_MEM_MAX_NR_PAGES`.
const MOST_PAGES: u64 = (1 << 31) - 1;
/// Just past the last address of user space with 4-level paging: `TASK_SIZE_MAX`.
const USER_SPACE_END: u64 = (1 << 47) - 4096;

/// Bounds that depend on the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Just past the last guest-physical address that the host's processor can address.
    pub(crate) gpa_end: Gpa,
    /// Whether slots can have private memory.
    pub(crate) private_memory: bool,
}

/// A change of the slots that may be made.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Nothing,
    Create(Slot),
    Delete(Arc<Slot>),
    Move { old: Arc<Slot>, new: Slot },
    Flags { old: Arc<Slot>, new: Slot },
}

/// What the region would change. `bind` is asked for the private memory of a slot that wants some, and may refuse.
///
/// # Errors
/// EINVAL and EEXIST as the kernel has them, or what `bind` gives.
pub(crate) fn plan(
    slots: &Snapshot,
    region: &kvm_userspace_memory_region2,
    limits: Limits,
    bind: impl FnOnce(&Slot) -> Result<PrivateMemory, Errno>,
) -> Result<Change, Errno> {
    let id = SlotId::parse(region.slot);
    let has_private = region.flags & KVM_MEM_GUEST_MEMFD != 0;
    // Private memory is neither logged nor read-only.
    let known = match (has_private, limits.private_memory) {
        (true, true) => KVM_MEM_GUEST_MEMFD,
        _ => KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY,
    };
    if region.flags & !known != 0 {
        return Err(Errno::INVAL);
    }
    let (gpa, hva) = (Gpa::new(region.guest_phys_addr), Hva::new(region.userspace_addr));
    let small = PageSize::Size4K;
    if !region.memory_size.is_multiple_of(small.bytes()) || !gpa.is_aligned(small) || !hva.is_aligned(small) {
        return Err(Errno::INVAL);
    }
    if hva.checked_add(region.memory_size).is_none_or(|end| end.raw() > USER_SPACE_END) {
        return Err(Errno::INVAL);
    }
    let private_end = region.guest_memfd_offset.checked_add(region.memory_size);
    if has_private && (!region.guest_memfd_offset.is_multiple_of(small.bytes()) || private_end.is_none()) {
        return Err(Errno::INVAL);
    }
    let id = id.ok_or(Errno::INVAL)?;
    let end = gpa.checked_add(region.memory_size).ok_or(Errno::INVAL)?;
    let pages = region.memory_size >> PAGE_SHIFT;
    if pages > MOST_PAGES {
        return Err(Errno::INVAL);
    }
    let old = slots.get(id).cloned();
    if pages == 0 {
        return old.map(Change::Delete).ok_or(Errno::INVAL);
    }
    let logging = region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0;
    // A log that is there goes on, also where the slot moves.
    let dirty = logging.then(|| {
        let log = old.as_ref().and_then(|old| old.dirty.clone());
        log.unwrap_or_else(|| Arc::new(DirtyLog::new(pages)))
    });
    let protection =
        if region.flags & KVM_MEM_READONLY != 0 { Protection::ReadOnly } else { Protection::Writable };
    let new =
        Slot { id, base: gpa.frame(), pages, hva, protection, state: State::Live, private: None, dirty };

    let mut change = match old {
        None => Change::Create(new),
        // A slot with private memory can't be changed, only deleted.
        Some(old) if has_private || old.private.is_some() => return Err(Errno::INVAL),
        Some(old) => {
            if (old.hva, old.pages, old.protection) != (new.hva, new.pages, new.protection) {
                return Err(Errno::INVAL);
            }
            if old.base != new.base {
                Change::Move { old, new }
            } else if old.dirty.is_some() != logging {
                Change::Flags { old, new }
            } else {
                Change::Nothing
            }
        }
    };
    if let Change::Create(new) | Change::Move { new, .. } = &change {
        let overlaps = |other: &Slot| other.id != id && other.base < new.end() && new.base < other.end();
        if slots.iter().any(|other| other.id.space == id.space && overlaps(other)) {
            return Err(Errno::EXIST);
        }
    }
    if let Change::Create(new) = &mut change
        && has_private
    {
        new.private = Some(bind(new)?);
    }
    if let Change::Create(new) | Change::Move { new, .. } = &change
        && end > limits.gpa_end
    {
        if let Some(private) = &new.private {
            private.unbind(new.id);
        }
        return Err(Errno::INVAL);
    }
    Ok(change)
}
