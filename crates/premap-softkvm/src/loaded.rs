//! The root that a vCPU walks from, whichever MMU it is of.

use std::sync::Arc;

use premap_address::{Gfn, Gpa};
use premap_kvm::Errno;
use premap_mmu::Permissions;
use premap_mmu::shadow::{ShadowRoot, Source};

use crate::machine::Machine;
use crate::mmio::MmioNotes;
use crate::mmu::{Mmu, RootKey};
use crate::roots::Root;
use crate::shadow::Shadow;

/// A root in use.
#[derive(Clone, Debug)]
pub(crate) enum Loaded {
    /// Of the TDP MMU, which keeps it whether it is used or not.
    Tdp(Arc<Root>),
    /// Of the shadow MMU.
    Shadow(Arc<ShadowUse>),
}

/// A use of a root in the shadow MMU. While there is one, the root is not evicted.
#[derive(Debug)]
pub(crate) struct ShadowUse {
    shadow: Arc<Shadow>,
    pub(crate) root: ShadowRoot,
    /// The guest's top-level table, if the root shadows one.
    pub(crate) table: Option<Gfn>,
    mmio: MmioNotes,
}

impl Drop for ShadowUse {
    fn drop(&mut self) {
        self.shadow.flush(self.shadow.mmu.release(self.root));
    }
}

impl Loaded {
    /// Whether the root was invalidated: it maps nothing and never will.
    pub(crate) fn is_obsolete(&self) -> bool {
        match self {
            Self::Tdp(root) => root.is_obsolete(),
            Self::Shadow(used) => used.shadow.mmu.is_obsolete(used.root),
        }
    }

    /// The guest's top-level table, where tables are shadowed. Elsewhere addresses are guest-physical.
    pub(crate) fn table(&self) -> Option<Gfn> {
        match self {
            Self::Tdp(_) => None,
            Self::Shadow(used) => used.table,
        }
    }

    pub(crate) fn mmio(&self) -> &MmioNotes {
        match self {
            Self::Tdp(root) => &root.mmio,
            Self::Shadow(used) => &used.mmio,
        }
    }

    /// What is permitted at an address, if it is mapped.
    pub(crate) fn permissions(&self, address: Gpa) -> Option<Permissions> {
        match self {
            Self::Tdp(root) => root.table.walk(address).map(|mapping| mapping.attributes.permissions),
            Self::Shadow(used) => {
                used.shadow.mmu.lookup(used.root, address).map(|mapping| mapping.attributes.permissions)
            }
        }
    }
}

impl Machine {
    /// The root for a purpose, made if there is none.
    ///
    /// # Errors
    /// ENOMEM: no memory for tables. ENOSPC: every shadow page is a root in use.
    pub(crate) fn load(&self, key: RootKey) -> Result<Loaded, Errno> {
        let (source, table) = match key.mmu {
            Mmu::Tdp => return self.roots.get(key.role).map(Loaded::Tdp),
            Mmu::Direct | Mmu::Nonpaging => (Source::Direct(key.role.levels), None),
            Mmu::Shadow(table) => (Source::Table(table), Some(table)),
        };
        let root = self.settle_shadow(self.shadow.mmu.root(source, key.role.tag()))?;
        let shadow = Arc::clone(&self.shadow);
        Ok(Loaded::Shadow(Arc::new(ShadowUse { shadow, root, table, mmio: MmioNotes::default() })))
    }
}
