//! Making leaves in the shadow, from what the host has.

use premap_address::{Gfn, Gpa, Pfn};
use premap_kvm::Errno;
use premap_mmu::shadow::{Demand, Filled, GuestMemory};
use premap_mmu::{Access, Permissions};

use super::Tables;
use crate::invalidation::Sequence;
use crate::loaded::ShadowUse;
use crate::machine::Machine;

/// What became of a leaf that was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placed {
    /// It was made or widened, and permits this.
    Mapped(Permissions),
    /// It was there.
    Spurious,
    /// The guest writes one of its tables.
    Emulate,
    /// What is known of the host, of the tables or of the root was overtaken.
    Stale,
}

/// What the host has behind a page, from a moment on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostPage<'m> {
    pub(crate) machine: &'m Machine,
    pub(crate) gfn: Gfn,
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
    pub(crate) sequence: Sequence,
}

/// For direct roots, which have no tables.
impl GuestMemory for HostPage<'_> {
    fn read(&self, _: Gpa) -> Option<u64> {
        None
    }

    fn exchange(&self, _: Gpa, _: u64, _: u64) -> bool {
        false
    }

    fn translate(&self, gfn: Gfn, _: Access) -> Option<(Pfn, bool)> {
        let page = gfn..Gfn::new(gfn.number() + 1);
        let holds = gfn == self.gfn && self.machine.invalidations.allows(self.sequence, &page);
        holds.then_some((self.pfn, self.writable))
    }
}

impl Machine {
    /// Makes the leaf for an address of a root, that of the page which the address, or the guest's tables, lead to.
    ///
    /// # Errors
    /// ENOSPC: every shadow page is in use. ENOMEM: no memory for one.
    pub(crate) fn place_shadow(
        &self,
        used: &ShadowUse,
        address: Gpa,
        demand: Demand,
        page: HostPage<'_>,
        tables: Option<&Tables<'_>>,
    ) -> Result<Placed, Errno> {
        loop {
            let section = self.shadow.enter();
            let filled = match tables {
                Some(tables) => {
                    self.shadow.mmu.fault(used.root, address, demand, &tables.known(&section, page))
                }
                None => self.shadow.mmu.fault(used.root, address, demand, &page),
            };
            drop(section);
            return match self.settle_shadow(filled) {
                Ok(Filled::Again) => continue,
                Ok(Filled::Mapped(permissions)) => Ok(Placed::Mapped(permissions)),
                Ok(Filled::Spurious) => Ok(Placed::Spurious),
                Ok(Filled::Emulate(_)) => Ok(Placed::Emulate),
                Err(Errno::AGAIN) => Ok(Placed::Stale),
                Err(errno) => Err(errno),
            };
        }
    }
}
