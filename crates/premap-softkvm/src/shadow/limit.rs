//! How many shadow pages a VM may have, and who takes some: the limit, and a host that is short of memory.

use std::sync::{Mutex, PoisonError};

use premap_kvm::Errno;

use crate::machine::Machine;
use crate::memslots::Snapshot;
use crate::profile::Shrinker;

/// No VM gets along with less: `KVM_MIN_ALLOC_MMU_PAGES`.
pub(super) const LEAST: usize = 64;
/// Pages of guest memory for which there is one shadow page, unless the VMM says otherwise:
/// `KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO`.
const GUEST_PAGES: u64 = 50;

/// Who says what the limit is. Held while it is changed.
#[derive(Debug, Default)]
pub(crate) struct PageLimit(Mutex<SetBy>);

#[derive(Clone, Copy, Debug, Default)]
enum SetBy {
    /// It follows the slots.
    #[default]
    Slots,
    /// The VMM has said, for good.
    Vmm,
}

impl Machine {
    /// `KVM_SET_NR_MMU_PAGES`.
    pub(crate) fn set_page_limit(&self, pages: u64) -> Result<(), Errno> {
        let pages = usize::try_from(pages).ok().filter(|pages| *pages >= LEAST).ok_or(Errno::INVAL)?;
        let mut set_by = self.shadow.limit.0.lock().unwrap_or_else(PoisonError::into_inner);
        *set_by = SetBy::Vmm;
        self.shadow.flush(self.shadow.mmu.set_limit(pages));
        Ok(())
    }

    /// Lets the limit follow slots that were made or deleted.
    pub(crate) fn follow_slots(&self, slots: &Snapshot) {
        let set_by = self.shadow.limit.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let SetBy::Slots = *set_by {
            let pages: u64 = slots.iter().map(|slot| slot.pages).sum();
            let limit = usize::try_from(pages / GUEST_PAGES).unwrap_or(usize::MAX).max(LEAST);
            self.shadow.flush(self.shadow.mmu.set_limit(limit));
        }
    }

    /// Gives shadow pages back to a host that is short of memory, where KVM has a shrinker; returns how many.
    pub(crate) fn shrink(&self, pages: u64) -> u64 {
        match self.rules().shrinker {
            Shrinker::Absent => 0,
            Shrinker::TakesPages => {
                let zap = self.shadow.mmu.shrink(usize::try_from(pages).unwrap_or(usize::MAX));
                let freed = zap.pages();
                self.shadow.flush(zap);
                u64::try_from(freed).unwrap_or(u64::MAX)
            }
        }
    }
}
