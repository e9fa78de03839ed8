//! Filling the shadow: what a page fault does.

use alloc::vec::Vec;
use core::fmt;

use premap_address::{Gfn, Gpa};

use super::guest::{GuestFault, GuestMemory, GuestWalk, walk};
use super::pages::{Key, PageId, Pages, Tracking};
use super::{Gone, ShadowMmu, ShadowRoot, Zap};
use crate::attributes::{Access, Attributes, Permissions, Use};
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::table::Present;

/// Why a leaf is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Somebody waits to touch it so, and the leaf notes that it was touched.
    Access(Access),
    /// Nobody touches it yet: it is made as for a read. `Present` says what becomes of one that is there; where it is
    /// kept, it is kept whatever it permits.
    Ahead(Present),
}

impl Demand {
    fn access(self) -> Access {
        match self {
            Self::Access(access) => access,
            Self::Ahead(_) => Access::Read,
        }
    }
}

/// What handling a fault did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// A leaf was made, or widened, that permits this.
    Mapped(Permissions),
    /// The leaf was there.
    Spurious,
    /// A table on the way is tracked from now on, and was not yet followed: once the [`Zap`] is completed, call again.
    Again,
    /// The guest writes to one of its tables that is shadowed: the caller does the write itself and then tells
    /// [`written`](ShadowMmu::written).
    Emulate(Gpa),
}

/// Why a fault can't be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowFault {
    /// It is the guest's: its own tables do not translate the access.
    Guest(GuestFault),
    /// The host has nothing behind this frame, or not for this access.
    NoFrame(Gfn),
    /// All shadow pages are in use as roots or on the way to the fault.
    OutOfPages,
    /// The allocator has no frame.
    OutOfFrames,
    /// Everything was invalidated since the root was had.
    Obsolete,
}

impl fmt::Display for ShadowFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(fault) => write!(f, "a fault of the guest: {fault:?}"),
            Self::NoFrame(gfn) => write!(f, "no host frame behind {gfn:?}"),
            Self::OutOfPages => f.write_str("every shadow page is in use"),
            Self::OutOfFrames => f.write_str("out of frames for tables"),
            Self::Obsolete => f.write_str("the root is obsolete"),
        }
    }
}

impl core::error::Error for ShadowFault {}

impl<F: Format, A: FrameAllocator> ShadowMmu<F, A> {
    /// Handles a fault: walks the guest's tables, if the root shadows any, and makes the shadow follow them down to a leaf
    /// of 4 KiB. `memory` is asked under the lock: what it says of a frame has to be true until that frame is
    /// [unmapped](Self::unmap).
    ///
    /// # Errors
    /// The guest's own fault, or what kept the host from mapping. What was evicted on the way comes along.
    pub fn fault(
        &self,
        root: ShadowRoot,
        address: Gpa,
        demand: Demand,
        memory: &impl GuestMemory,
    ) -> Result<(Filled, Zap<'_, A>), (ShadowFault, Zap<'_, A>)> {
        let (result, zap) = self.change(|pages, frames, gone| {
            if root.generation != pages.generation() {
                return Err(ShadowFault::Obsolete);
            }
            pages.fill(root.page, address, demand, memory, frames, gone)
        });
        match result {
            Ok(filled) => Ok((filled, zap)),
            Err(fault) => Err((fault, zap)),
        }
    }
}

impl<F: Format> Pages<F> {
    fn fill(
        &mut self,
        root: PageId,
        address: Gpa,
        demand: Demand,
        memory: &impl GuestMemory,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) -> Result<Filled, ShadowFault> {
        let (top, access) = (self.key(root), demand.access());
        let found = if top.direct {
            GuestWalk { tables: Vec::new(), gfn: address.frame(), permissions: Permissions::ALL }
        } else {
            walk(memory, top.gfn, address, access).map_err(ShadowFault::Guest)?
        };
        let (pfn, host_writable) =
            memory.translate(found.gfn, access).ok_or(ShadowFault::NoFrame(found.gfn))?;
        // The pages on the way are made first: making one can turn the very frame into a tracked one.
        let mut id = root;
        for level in (1..top.level).rev() {
            let entry = index(address, level + 1);
            let key = key_below(top, &found, level);
            id = match self.child(id, entry) {
                Some(child) if self.key(child) == key => child,
                _ => {
                    self.clear(id, entry, frames, gone);
                    let (child, tracking) = self.get_or_make(key, frames, Some(id), gone)?;
                    if tracking == Tracking::Began {
                        return Ok(Filled::Again);
                    }
                    self.link(id, entry, child, frames);
                    child
                }
            };
        }
        let tracked = self.is_tracked(found.gfn);
        if tracked && access == Access::Write {
            return Ok(Filled::Emulate(found.gfn.address().wrapping_add(address.page_offset())));
        }
        if access == Access::Write && !host_writable {
            return Err(ShadowFault::NoFrame(found.gfn));
        }
        let permissions =
            if host_writable && !tracked { found.permissions } else { found.permissions.without_write() };
        let accessed = matches!(demand, Demand::Access(_));
        let used = Use { accessed, dirty: permissions.writable() };
        let entry = index(address, 1);
        if let Some(was) = self.leaf(id, entry, (found.gfn, pfn), frames) {
            let kept = match demand {
                Demand::Access(_) => was.contains(permissions),
                Demand::Ahead(present) => present != Present::Rebuild,
            };
            if kept {
                return Ok(Filled::Spurious);
            }
        } else {
            self.clear(id, entry, frames, gone);
        }
        let attributes = Attributes::new(permissions).with_use(used);
        self.map(id, entry, (found.gfn, pfn), attributes, frames, gone);
        Ok(Filled::Mapped(permissions))
    }
}

/// The key of the page of a level on the way from a root to the leaf that the guest's tables lead to.
fn key_below(root: Key, found: &GuestWalk, level: u8) -> Key {
    if let Some(&(table, _)) = found.tables.get(usize::from(root.level - level)) {
        return Key { gfn: table, level, direct: false, permissions: Permissions::ALL.bits(), ..root };
    }
    // The guest has no table there: none at all, or its leaf is larger, and what it maps is broken up. The leaf's
    // permissions are in the key then, since other entries of the guest can lead to the same memory with others.
    let pages = 1_u64 << (9 * u32::from(level));
    let gfn = Gfn::new(found.gfn.number() & !(pages - 1));
    Key { gfn, level, direct: true, permissions: found.permissions.bits(), ..root }
}
