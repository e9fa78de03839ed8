//! Shadow paging: tables that hardware walks, built from tables that a guest wrote.
//!
//! A guest's own page tables (64-bit, four levels) lead from its virtual addresses to guest-physical ones; an L1 hypervisor's
//! nested page tables, spelled alike, lead from its guest's physical addresses to its own. Either way the shadow leads from the
//! same input to host frames: each of the guest's tables in use has a *shadow page*, filled on demand. A *direct* root shadows no
//! table: it leads from guest-physical addresses to host frames, for a guest without paging, or for a hypervisor that has
//! two-dimensional paging and no other MMU to fill its tables.
//!
//! ```text
//!   guest:   root --> table --> table --> table --> gfn
//!              |        |         |         |        |  the host's translation
//!   shadow:  page --> page  --> page  --> page --> pfn
//! ```
//!
//! **Protocol.** One lock covers everything, as in Linux, where the shadow MMU runs under the MMU lock held for writing. A guest
//! table that is shadowed is *tracked*: every mapping of its frame is read-only, so a guest's write to it comes to the
//! caller, who does the write and tells [`written`](ShadowMmu::written); what was built from the entry goes. A table is followed only in a later
//! call than the one that began to track it: the [`Zap`] in between names the frame, for who maps it elsewhere, and flushes
//! writable translations of it, so that no write to an entry that was read goes unnoticed. Each frame that is mapped has a
//! *reverse map* of the entries that map it, by which tracking and the host's own invalidations find them. Pages are
//! limited in number: the oldest that is no root goes first, with all below it. Roots of different [tags](Tag) share no page. A new *generation* makes all pages obsolete at once
//! ([`invalidate_all`](ShadowMmu::invalidate_all)), and they are zapped in batches.
//!
//! **Guarantee.** A shadow leaf permits no more than the guest's tables did when it was built, all since unwritten, and than
//! the host's translation; no writable leaf maps a tracked frame; no leaf outlives the [`unmap`](ShadowMmu::unmap) of its frame. What has gone is
//! reused only after the caller has completed the [`Zap`], which is when it has flushed the TLBs.
//!
//! **Limit.** Leaves are of 4 KiB, where KVM's shadow MMU maps a large page of the guest by a large leaf if the host's side
//! allows it. A large leaf would have to be found and split from every frame within it: when the host takes that frame
//! away, and when it becomes a tracked table. The reverse maps here go by single frame, and [`GuestMemory::translate`]
//! says nothing of how far the host's translation reaches.

mod evict;
mod fault;
mod guest;
mod host;
mod pages;

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use premap_address::{Gfn, Gpa, Pfn};

pub use evict::More;
pub use fault::{Demand, Filled, ShadowFault};
pub use guest::{GuestFault, GuestMemory, guest_frame};
pub use pages::PageId;

use crate::attributes::{Access, Mapping};
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::spin::Spin;
use crate::sync::{AtomicUsize, Ordering};
use crate::table::Levels;
use pages::Pages;

/// The shadow pages of one virtual machine, in the format that its processor walks.
pub struct ShadowMmu<F: Format, A: FrameAllocator> {
    pages: Spin<Pages<F>>,
    /// How many frames are tracked, to be read without the lock.
    tracked: AtomicUsize,
    frames: A,
}

/// What a root translates by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The guest's tables, four levels of them, from the top-level one in this frame on.
    Table(Gfn),
    /// Nothing of the guest's: addresses are guest-physical.
    Direct(Levels),
}

/// A kind of root, of the caller's choice. Pages are shared among roots of the same tag only: a guest's frame can be
/// another piece of memory under another tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u8);

/// A root that a vCPU walks from. It is given back by [`ShadowMmu::release`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ShadowRoot {
    page: PageId,
    generation: u64,
}

/// What has gone from the shadow tables: an owed flush, and frames that wait for it.
#[must_use = "what it owes is owed until it is completed"]
pub struct Zap<'m, A: FrameAllocator> {
    frames: &'m A,
    gone: Gone,
}

/// What has gone so far in an operation.
#[derive(Debug, Default)]
pub(crate) struct Gone {
    leaves: u64,
    pages: Vec<Pfn>,
    /// A leaf lost its permission to write.
    narrowed: bool,
    /// Frames whose tracking began.
    tracked: Vec<Gfn>,
}

impl<A: FrameAllocator> fmt::Debug for Zap<'_, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zap").field("gone", &self.gone).finish_non_exhaustive()
    }
}

impl<A: FrameAllocator> Zap<'_, A> {
    /// How many leaves have gone.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.gone.leaves
    }

    /// How many shadow pages have gone.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.gone.pages.len()
    }

    /// The guest's frames that are tracked from now on. Who maps them elsewhere takes the permission to write them away
    /// before this is completed.
    #[must_use]
    pub fn tracked(&self) -> &[Gfn] {
        &self.gone.tracked
    }

    /// Whether a flush is owed.
    #[must_use]
    pub fn is_owed(&self) -> bool {
        self.gone.leaves != 0 || !self.gone.pages.is_empty() || self.gone.narrowed
    }

    /// Runs `invalidate` if a flush is owed, and gives the frames back. A processor may hold any translation that came
    /// from the shadow until `invalidate` returns: it flushes all of them.
    pub fn complete(mut self, invalidate: impl FnOnce()) {
        if self.is_owed() {
            invalidate();
        }
        pages::free(self.frames, self.gone.pages.drain(..));
    }
}

impl<F: Format, A: FrameAllocator> fmt::Debug for ShadowMmu<F, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowMmu").field("pages", &self.pages()).finish_non_exhaustive()
    }
}

impl<F: Format, A: FrameAllocator> ShadowMmu<F, A> {
    /// Makes an empty shadow of at most so many pages.
    pub fn new(frames: A, limit: usize) -> Self {
        Self { pages: Spin::new(Pages::new(limit)), tracked: AtomicUsize::new(0), frames }
    }

    /// Runs an operation under the lock, and gives what has gone.
    fn change<R>(&self, operation: impl FnOnce(&mut Pages<F>, &A, &mut Gone) -> R) -> (R, Zap<'_, A>) {
        let mut pages = self.pages.lock();
        let mut gone = Gone::default();
        let result = operation(&mut pages, &self.frames, &mut gone);
        self.tracked.store(pages.tracked_frames(), Ordering::Release);
        (result, Zap { frames: &self.frames, gone })
    }

    /// How many shadow pages there are, obsolete ones included.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.lock().len()
    }

    /// How many leaves there are, all of 4 KiB.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.pages.lock().leaves()
    }

    /// Whether any frame of the guest holds a table that is shadowed. It takes no lock, and is as good as
    /// [`is_tracked`](Self::is_tracked) under the rule that is told there.
    #[must_use]
    pub fn tracks_any(&self) -> bool {
        self.tracked.load(Ordering::Acquire) != 0
    }

    /// Whether the guest's frame holds a table that is shadowed.
    ///
    /// Who maps frames elsewhere asks it under the lock by which a [`Zap`]'s tracked frames are write-protected there. Then
    /// no writable mapping of a tracked frame outlives the zap that named it.
    #[must_use]
    pub fn is_tracked(&self, gfn: Gfn) -> bool {
        self.tracks_any() && self.pages.lock().is_tracked(gfn)
    }

    /// Whether any of these frames does. The same rule holds.
    #[must_use]
    pub fn tracks(&self, frames: Range<Gfn>) -> bool {
        self.tracks_any() && self.pages.lock().tracks(frames)
    }

    /// A root that translates by this. A vCPU walks from it until it is released.
    ///
    /// # Errors
    /// No shadow page is to be had: all are roots, or the allocator has no frame. What was evicted on the way comes along.
    pub fn root(
        &self,
        source: Source,
        tag: Tag,
    ) -> Result<(ShadowRoot, Zap<'_, A>), (ShadowFault, Zap<'_, A>)> {
        let (made, zap) = self.change(|pages, frames, gone| {
            let key = pages.key_of_root(source, tag);
            let (page, _) = pages.get_or_make(key, frames, None, gone)?;
            pages.hold(page);
            Ok(ShadowRoot { page, generation: pages.generation() })
        });
        match made {
            Ok(root) => Ok((root, zap)),
            Err(fault) => Err((fault, zap)),
        }
    }

    /// Gives a root back. Its pages stay until they are evicted, so that a vCPU that comes back finds them; those of an
    /// obsolete one go at once.
    pub fn release(&self, root: ShadowRoot) -> Zap<'_, A> {
        let release = |pages: &mut Pages<F>, frames: &A, gone: &mut Gone| {
            pages.let_go(root.page);
            if pages.is_obsolete(root.page) && !pages.is_root(root.page) {
                pages.zap(root.page, frames, gone);
            }
        };
        self.change(release).1
    }

    /// The frame of the root's table, for the processor.
    #[must_use]
    pub fn frame(&self, root: ShadowRoot) -> Pfn {
        self.pages.lock().frame(root.page)
    }

    /// Whether everything was invalidated since the root was had: the vCPU releases it and gets another.
    #[must_use]
    pub fn is_obsolete(&self, root: ShadowRoot) -> bool {
        self.pages.lock().generation() != root.generation
    }

    /// Translates an access by the shadow alone, setting accessed and dirty as the processor would. `None` is a fault,
    /// for [`fault`](Self::fault) to handle.
    #[must_use]
    pub fn access(&self, root: ShadowRoot, address: Gpa, access: Access) -> Option<Mapping<F>> {
        self.pages.lock().access(root.page, address, access, &self.frames)
    }

    /// What the shadow has for an address, touched by nobody.
    #[must_use]
    pub fn lookup(&self, root: ShadowRoot, address: Gpa) -> Option<Mapping<F>> {
        self.pages.lock().lookup(root.page, address, &self.frames)
    }
}

impl<F: Format, A: FrameAllocator> Drop for ShadowMmu<F, A> {
    fn drop(&mut self) {
        let frames = self.pages.get_mut().all_frames();
        pages::free(&self.frames, frames);
    }
}
