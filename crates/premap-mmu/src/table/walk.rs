//! Walking: lock-free, and as the processor does it.

use core::fmt;

use premap_address::{Gpa, PageSize};

use super::PageTable;
use crate::attributes::{Access, Mapping};
use crate::epoch::Guard;
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::protocol::{State, leaf, state, touch};

/// A walker's view of a table: while it lives no table that it can reach is freed, and no
/// [`synchronize`](PageTable::synchronize) returns.
///
/// A software vCPU holds one from the translation to the end of the access, as a processor holds off the
/// acknowledgement of a TLB shoot-down. It must not be held while a flush of the same table is completed by waiting.
pub struct View<'t, F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    pub(crate) table: &'t PageTable<F, A, M>,
    pub(crate) guard: Guard<'t>,
}

impl<F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for View<'_, F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("table", self.table).finish_non_exhaustive()
    }
}

/// Why a guest's access does not go through: the violation that hardware would report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessFault<F: Format> {
    /// Nothing is mapped there, or the table does not reach that far.
    NotMapped,
    /// This leaf is mapped and does not permit the access.
    NotPermitted(Mapping<F>),
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Opens a view, for several walks or for an access that follows one.
    #[inline]
    pub fn view(&self) -> View<'_, F, A, M> {
        View { table: self, guard: self.epochs.pin() }
    }

    /// The leaf that maps an address, if there is one. Takes no lock.
    #[inline]
    #[must_use]
    pub fn walk(&self, gpa: Gpa) -> Option<Mapping<F>> {
        self.view().walk(gpa)
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> View<'_, F, A, M> {
    /// The leaf that maps an address, if there is one. Takes no lock.
    #[inline]
    #[must_use]
    pub fn walk(&self, gpa: Gpa) -> Option<Mapping<F>> {
        if let Some((_, _, page)) = self.table.straight_down(&self.guard, gpa) {
            let raw = leaf::load(page.word(index(gpa, 1)));
            return PageTable::<F, A, M>::leaf_at(raw, 1, gpa.align_down(PageSize::Size4K));
        }
        if gpa >= self.table.limit {
            return None;
        }
        let position = self.table.locate(&self.guard, gpa, 1);
        PageTable::<F, A, M>::leaf_at(position.raw, position.level, position.base)
    }

    /// Translates an access the way the processor does: checks the permission, and sets accessed and, for a write, dirty
    /// in the leaf at the same moment at which the leaf is known to be still there. Returns the leaf as it is then.
    ///
    /// # Errors
    /// Nothing is mapped, or the access is not permitted.
    #[inline]
    pub fn access(&self, gpa: Gpa, access: Access) -> Result<Mapping<F>, AccessFault<F>> {
        if gpa >= self.table.limit {
            return Err(AccessFault::NotMapped);
        }
        loop {
            let position = self.table.locate(&self.guard, gpa, 1);
            let (word, raw) = (position.page.word(position.index), position.raw);
            if state::<F>(raw, position.level) != State::Leaf {
                return Err(AccessFault::NotMapped);
            }
            let found = |raw| {
                PageTable::<F, A, M>::leaf_at(raw, position.level, position.base)
                    .ok_or(AccessFault::NotMapped)
            };
            let Some(touched) = F::touch(raw, access) else {
                return Err(AccessFault::NotPermitted(found(raw)?));
            };
            if touched == raw || touch(word, raw, touched) {
                return found(touched);
            }
        }
    }
}
