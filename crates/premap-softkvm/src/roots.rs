//! Second-stage roots: one for each role, shared by the vCPUs that have it.
//!
//! **Protocol.** A vCPU takes the current root of its role when it has none. Invalidation takes roots out of the list,
//! marks them obsolete, and only then takes their mappings away. A vCPU that still holds an obsolete root can map nothing
//! in it, since every mapping asks for that under the leaf table's lock; it drops the root the next time it runs, and the
//! last holder frees the tables. Until then the list holds a root as well: it survives every vCPU that used it, a change of
//! their roles, and a reset.
//!
//! **Guarantee.** When [`Roots::invalidate`] returns, no mapping of the obsolete roots is left and no vCPU is in the middle
//! of an access through one.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use premap_address::{Gfn, GpaRange, PAGE_SIZE};
use premap_kvm::Errno;
use premap_mmu::{Changed, Edges, Leaves, NoMirror, Npt, PageTable};

use crate::frames::Frames;
use crate::mmio::MmioNotes;
use crate::role::{Role, Spaces};

/// The second-stage table of a root. AMD's format: what the lab's real kernels use.
pub(crate) type Table = PageTable<Npt, Arc<Frames>>;

/// A second-stage root.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) role: Role,
    pub(crate) table: Table,
    obsolete: AtomicBool,
    pub(crate) mmio: MmioNotes,
}

impl Root {
    /// Whether the root was invalidated: it maps nothing and never will.
    pub(crate) fn is_obsolete(&self) -> bool {
        self.obsolete.load(Ordering::Acquire)
    }
}

/// A VM's current roots.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    current: Mutex<Vec<Arc<Root>>>,
    frames: Arc<Frames>,
    flushes: AtomicU64,
}

impl Roots {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Root>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root of a role, made if there is none.
    pub(crate) fn get(&self, role: Role) -> Result<Arc<Root>, Errno> {
        let mut current = self.lock();
        if let Some(root) = current.iter().find(|root| root.role == role) {
            return Ok(Arc::clone(root));
        }
        let root = Arc::new(Root {
            role,
            table: Table::new(Arc::clone(&self.frames), role.levels).map_err(|_| Errno::NOMEM)?,
            obsolete: AtomicBool::new(false),
            mmio: MmioNotes::default(),
        });
        current.push(Arc::clone(&root));
        Ok(root)
    }

    /// The roots as they are now.
    pub(crate) fn list(&self) -> Vec<Arc<Root>> {
        self.lock().clone()
    }

    /// What is mapped, by size.
    pub(crate) fn leaves(&self) -> Leaves {
        self.lock().iter().fold(Leaves::NONE, |sum, root| sum + root.table.leaves())
    }

    /// Where tables lie.
    pub(crate) fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// TLB flushes so far.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Makes every root obsolete and takes its mappings away.
    pub(crate) fn invalidate(&self) {
        let roots = std::mem::take(&mut *self.lock());
        for root in &roots {
            root.obsolete.store(true, Ordering::SeqCst);
        }
        for root in &roots {
            let all = GpaRange::new(premap_address::Gpa::new(0), root.role.levels.limit().raw());
            self.settle(&root.table, root.table.unmap(all, Edges::Whole));
        }
    }

    /// Takes the mappings of these pages away in every root of the spaces. A larger mapping that holds one of them goes
    /// whole.
    pub(crate) fn unmap(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.change(spaces, pages, |table, range| table.unmap(range, Edges::Whole));
    }

    /// Takes the permission to write these pages away in every root of the spaces, splitting larger mappings.
    pub(crate) fn write_protect(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.change(spaces, pages, |table, range| table.write_protect(range, Edges::Split));
    }

    /// Runs an operation on every root of the spaces; when this returns no vCPU uses what it took away.
    pub(crate) fn change(
        &self,
        spaces: Spaces,
        pages: &Range<Gfn>,
        operation: impl for<'t> Fn(&'t Table, GpaRange) -> Changed<'t, Npt, Arc<Frames>, NoMirror>,
    ) {
        let count = pages.end.number().saturating_sub(pages.start.number());
        if count == 0 {
            return;
        }
        let range = GpaRange::new(pages.start.address(), count * PAGE_SIZE);
        for root in self.list() {
            if spaces.have(root.role.space) {
                self.settle(&root.table, operation(&root.table, range));
            }
        }
    }

    fn settle(&self, table: &Table, changed: Changed<'_, Npt, Arc<Frames>, NoMirror>) {
        if changed.flush.is_owed() {
            self.flushes.fetch_add(1, Ordering::Relaxed);
        }
        changed.flush.complete_by_waiting();
        debug_assert!(changed.stopped.is_none(), "{:?} of {table:?}", changed.stopped);
    }
}
