//! Roots by role: one page table for each way a vCPU can look at guest memory.
//!
//! **Protocol.** A root is had by its role; who asks for a role that has no valid root gets a new one. Roots are
//! reference-counted: each [`RootRef`] keeps its root alive. [`invalidate_all`](Roots::invalidate_all) makes every root obsolete at once, at the cost of
//! a flag each: from then on asking for the role gives a new, empty root, and who holds an old one sees that it
//! [is obsolete](RootRef::is_obsolete) and lets go. What obsolete roots map is zapped in the background, a piece at a
//! time ([`zap`](Roots::zap)): first all 4 KiB leaves, then 2 MiB, then 1 GiB, and at last the root goes, so that a pass can stop
//! anywhere and tell how far it got.
//!
//! **Guarantee.** A mapping made under a root that was obsolete when the caller checked it, under the entry's lock, is never
//! reachable from a valid root; and no root is freed while a reference to it lives.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use premap_address::{Gpa, GpaRange, PageSize};

use crate::attributes::Leaves;
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::spin::Spin;
use crate::sync::{AtomicU64, Ordering};
use crate::table::{Edges, Levels, OutOfFrames, PageTable};

/// A page table and the role that it plays.
struct Root<R, F: Format, A: FrameAllocator, M: Mirror> {
    role: R,
    table: PageTable<F, A, M>,
    obsolete: AtomicU64,
}

/// A reference to a root; the root lives at least as long.
pub struct RootRef<R, F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    root: Arc<Root<R, F, A, M>>,
}

impl<R, F: Format, A: FrameAllocator, M: Mirror> Clone for RootRef<R, F, A, M> {
    fn clone(&self) -> Self {
        Self { root: self.root.clone() }
    }
}

impl<R: fmt::Debug, F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for RootRef<R, F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootRef")
            .field("role", &self.root.role)
            .field("obsolete", &self.is_obsolete())
            .field("table", &self.root.table)
            .finish()
    }
}

impl<R: Copy, F: Format, A: FrameAllocator, M: Mirror> RootRef<R, F, A, M> {
    /// The role.
    #[must_use]
    pub fn role(&self) -> R {
        self.root.role
    }

    /// The page table.
    #[must_use]
    pub fn table(&self) -> &PageTable<F, A, M> {
        &self.root.table
    }
}

impl<R, F: Format, A: FrameAllocator, M: Mirror> RootRef<R, F, A, M> {
    /// Whether the root was invalidated since it was had. Asked in the check of [`place`](PageTable::place) it keeps stale
    /// mappings out.
    #[must_use]
    pub fn is_obsolete(&self) -> bool {
        self.root.obsolete.load(Ordering::SeqCst) != 0
    }

    /// Whether both are the same root.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.root, &other.root)
    }
}

/// How far zapping got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zapped {
    /// There was no obsolete root.
    Nothing,
    /// Leaves went; there may be more.
    Some(Leaves),
    /// The last leaves of a root had gone, and the root went, or goes with its last reference.
    Root,
}

/// What remains to be zapped of an obsolete root: from which address on, of which size.
struct Zap<R, F: Format, A: FrameAllocator, M: Mirror> {
    root: Arc<Root<R, F, A, M>>,
    size: PageSize,
    next: Gpa,
}

/// Roots that are handed out.
type Shared<R, F, A, M> = Vec<Arc<Root<R, F, A, M>>>;

/// The roots of one address space.
pub struct Roots<R, F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    valid: Spin<Shared<R, F, A, M>>,
    obsolete: Spin<Vec<Zap<R, F, A, M>>>,
}

impl<R: fmt::Debug, F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for Roots<R, F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots")
            .field("valid", &self.valid.lock().len())
            .field("obsolete", &self.obsolete.lock().len())
            .finish()
    }
}

impl<R: Copy + Eq, F: Format, A: FrameAllocator, M: Mirror> Default for Roots<R, F, A, M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Copy + Eq, F: Format, A: FrameAllocator, M: Mirror> Roots<R, F, A, M> {
    /// No roots yet.
    #[must_use]
    pub fn new() -> Self {
        Self { valid: Spin::new(Vec::new()), obsolete: Spin::new(Vec::new()) }
    }

    /// The valid root of a role, made by `make` if there is none.
    ///
    /// # Errors
    /// What `make` says.
    pub fn get_with(
        &self,
        role: R,
        make: impl FnOnce() -> Result<PageTable<F, A, M>, OutOfFrames>,
    ) -> Result<RootRef<R, F, A, M>, OutOfFrames> {
        let mut valid = self.valid.lock();
        if let Some(root) = valid.iter().find(|root| root.role == role) {
            return Ok(RootRef { root: root.clone() });
        }
        let root = Arc::new(Root { role, table: make()?, obsolete: AtomicU64::new(0) });
        valid.push(root.clone());
        Ok(RootRef { root })
    }

    /// The roots that are valid now.
    #[must_use]
    pub fn valid(&self) -> Vec<RootRef<R, F, A, M>> {
        self.valid.lock().iter().map(|root| RootRef { root: root.clone() }).collect()
    }

    /// The leaves of all roots, obsolete ones included until they are zapped.
    #[must_use]
    pub fn leaves(&self) -> Leaves {
        let valid = self.valid.lock();
        let obsolete = self.obsolete.lock();
        let tables = valid.iter().chain(obsolete.iter().map(|zap| &zap.root));
        tables.fold(Leaves::NONE, |sum, root| sum + root.table.leaves())
    }

    /// Makes every root obsolete, at once. The caller has every vCPU let go of its root before it next enters the guest.
    pub fn invalidate_all(&self) {
        let mut valid = self.valid.lock();
        // Lock order: valid before obsolete.
        let mut obsolete = self.obsolete.lock();
        for root in valid.drain(..) {
            root.obsolete.store(1, Ordering::SeqCst);
            obsolete.push(Zap { root, size: PageSize::Size4K, next: Gpa::new(0) });
        }
    }

    /// Zaps obsolete roots, at most about `leaves` leaves, so that the caller can let others run between calls.
    ///
    /// The flush is done by `invalidate`, once a call, before anything is freed.
    pub fn zap(&self, leaves: u64, invalidate: impl FnOnce(GpaRange)) -> Zapped {
        let Some(mut zap) = self.obsolete.lock().pop() else { return Zapped::Nothing };
        let table = &zap.root.table;
        let mut gone = Leaves::NONE;
        let mut flush = crate::flush::Flush::none(table);
        while gone.total() < leaves {
            let end = table.levels().limit();
            let Some(leaf) = table.first_leaf_from(zap.next, zap.size) else {
                zap.next = Gpa::new(0);
                match zap.size {
                    PageSize::Size4K => zap.size = PageSize::Size2M,
                    PageSize::Size2M => zap.size = PageSize::Size1G,
                    PageSize::Size1G if gone == Leaves::NONE => {
                        flush.complete(|_| ());
                        return Zapped::Root;
                    }
                    PageSize::Size1G => break,
                }
                continue;
            };
            // A leaf table goes as a whole where it can.
            let span = if zap.size == PageSize::Size4K { PageSize::Size2M } else { zap.size };
            let base = leaf.align_down(span);
            let done = table.unmap(GpaRange::new(base, span.bytes()), Edges::Whole);
            gone += done.leaves;
            flush.merge(done.flush);
            zap.next = base.wrapping_add(span.bytes()).min(end);
        }
        flush.complete(invalidate);
        self.obsolete.lock().push(zap);
        Zapped::Some(gone)
    }
}

impl<R: Copy + Eq, F: Format, A: FrameAllocator + Clone> Roots<R, F, A, NoMirror> {
    /// The valid root of a role, made with a clone of the allocator if there is none.
    ///
    /// # Errors
    /// The allocator has no frame for a new root.
    pub fn get(&self, role: R, levels: Levels, frames: &A) -> Result<RootRef<R, F, A>, OutOfFrames> {
        self.get_with(role, || PageTable::new(frames.clone(), levels))
    }
}
