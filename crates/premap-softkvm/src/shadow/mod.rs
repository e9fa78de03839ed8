//! The shadow MMU of a VM: direct pages without a TDP MMU, and shadows of tables that guests wrote.
//!
//! **Protocol.** premap-mmu's `ShadowMmu` has the tables, under one lock of its own. What a vCPU does with a translation that it
//! took from there, and with the guest's own tables, it does in a [`Section`]; a flush waits for all sections. So what the
//! host takes away is no longer touched once the invalidation has begun: whoever reads or writes the guest's memory looks,
//! *inside its section*, whether the invalidations allow it (`invalidation`), and an invalidation first says so there, and then
//! flushes.
//!
//! A frame that becomes a shadowed table loses its writable mappings in the roots of the TDP MMU too, before it is
//! read: a guest's hypervisor writes its nested tables through those.
//!
//! **Limits**, where KVM does more: leaves are of 4 KiB; the guest's tables have four levels; a table is never out of step with its
//! shadow, so that a guest needs no flush of its own.
//!
//! **Lock order**: a section, then the lock of the shadow pages. A leaf table of the TDP MMU may be locked outside of the
//! latter. Nothing that waits for the host, and no flush, comes inside a section.

mod fault;
mod limit;
mod tables;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use premap_address::Gfn;
use premap_kvm::Errno;
use premap_mmu::Npt;
use premap_mmu::shadow::{More, ShadowFault, ShadowMmu, Zap};

use crate::frames::Frames;
use crate::machine::Machine;
use crate::role::Spaces;

pub(crate) use fault::{HostPage, Placed};
pub(crate) use limit::PageLimit;
pub(crate) use tables::Tables;

/// Obsolete pages that are zapped before others may have the lock: KVM's batch.
const BATCH: usize = 10;

/// A VM's shadow pages, with what a flush waits for.
#[derive(Debug)]
pub(crate) struct Shadow {
    pub(crate) mmu: ShadowMmu<Npt, Arc<Frames>>,
    /// Read by who is in a section, written by who flushes.
    sections: RwLock<()>,
    flushes: AtomicU64,
    pub(crate) limit: PageLimit,
}

/// What an operation of the shadow MMU comes back with, owing what it zapped.
type Zapped<'z, T> = Result<(T, Zap<'z, Arc<Frames>>), (ShadowFault, Zap<'z, Arc<Frames>>)>;

/// A use of translations and tables; every flush waits for its end.
#[must_use]
#[derive(Debug)]
pub(crate) struct Section<'s> {
    _reading: RwLockReadGuard<'s, ()>,
}

impl Shadow {
    pub(crate) fn new(frames: &Arc<Frames>) -> Self {
        Self {
            mmu: ShadowMmu::new(Arc::clone(frames), limit::LEAST),
            sections: RwLock::default(),
            flushes: AtomicU64::new(0),
            limit: PageLimit::default(),
        }
    }

    /// Begins a section. The caller is in none, and holds no lock of this module.
    pub(crate) fn enter(&self) -> Section<'_> {
        Section { _reading: self.sections.read().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Waits for the end of every section that began before.
    fn wait_for_sections(&self) {
        drop(self.sections.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Does what a zap owes that tracks nothing new.
    pub(crate) fn flush(&self, zap: Zap<'_, Arc<Frames>>) {
        debug_assert!(zap.tracked().is_empty(), "{zap:?}");
        zap.complete(|| {
            self.flushes.fetch_add(1, Ordering::Relaxed);
            self.wait_for_sections();
        });
    }

    /// TLB flushes so far.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Takes the mappings of these pages away. When this returns no vCPU is in the middle of an access to them, and none
    /// reads them as tables.
    pub(crate) fn unmap(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.flush(self.mmu.unmap(pages.clone(), |tag| spaces.have_tag(tag)));
        // Tables are read without being mapped.
        self.wait_for_sections();
    }

    /// Takes the permission to write these pages away.
    pub(crate) fn write_protect(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.flush(self.mmu.write_protect(pages.clone(), |tag| spaces.have_tag(tag)));
    }

    /// Takes away what was built from tables in these pages, whose slot goes.
    pub(crate) fn forget(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.flush(self.mmu.forget_tables(pages.clone(), |tag| spaces.have_tag(tag)));
    }

    /// Makes every root obsolete and takes its mappings away.
    pub(crate) fn invalidate(&self) {
        self.mmu.invalidate_all();
        loop {
            let (zap, more) = self.mmu.zap_obsolete(BATCH);
            self.flush(zap);
            if more == More::None {
                return;
            }
        }
    }
}

impl Machine {
    /// Does what an operation of the shadow MMU owes, and gives its result with KVM's errno.
    ///
    /// # Errors
    /// ENOSPC: every shadow page is in use. ENOMEM: no memory for one. EAGAIN: all else, which to try again may help.
    pub(crate) fn settle_shadow<T>(&self, result: Zapped<'_, T>) -> Result<T, Errno> {
        let (result, zap) = match result {
            Ok((value, zap)) => (Ok(value), zap),
            Err((fault, zap)) => (Err(fault), zap),
        };
        for gfn in zap.tracked() {
            self.roots.write_protect(Spaces::All, &(*gfn..Gfn::new(gfn.number() + 1)));
        }
        zap.complete(|| {
            self.shadow.flushes.fetch_add(1, Ordering::Relaxed);
            self.shadow.wait_for_sections();
        });
        result.map_err(|fault| match fault {
            ShadowFault::OutOfPages => Errno::NOSPC,
            ShadowFault::OutOfFrames => Errno::NOMEM,
            ShadowFault::Guest(_) | ShadowFault::NoFrame(_) | ShadowFault::Obsolete => Errno::AGAIN,
        })
    }
}
