//! Filling the shadow: what a page fault does.

use core::fmt;

use premap_address::{Gfn, Gpa, PageSize};

use super::guest::{GuestFault, GuestMemory, GuestWalk, walk};
use super::pages::{Key, PageId, Pages};
use super::{Gone, ShadowMmu, ShadowRoot, Zap};
use crate::attributes::{Access, Attributes, Permissions, Use};
use crate::format::{Format, index};
use crate::frames::FrameAllocator;

/// What handling a fault did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The access goes through now.
    Mapped,
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
    /// Handles a fault: walks the guest's tables, and makes the shadow follow them down to a leaf of 4 KiB.
    ///
    /// # Errors
    /// The guest's own fault, or what kept the host from mapping. What was evicted on the way comes along.
    pub fn fault(
        &self,
        root: ShadowRoot,
        address: Gpa,
        access: Access,
        memory: &impl GuestMemory,
    ) -> Result<(Filled, Zap<'_, A>), (ShadowFault, Zap<'_, A>)> {
        let mut pages = self.pages.lock();
        let mut gone = Gone::default();
        let result = if root.generation == pages.generation() {
            pages.fill(root.page, address, access, memory, &self.frames, &mut gone)
        } else {
            Err(ShadowFault::Obsolete)
        };
        match result {
            Ok(filled) => Ok((filled, self.zap(gone))),
            Err(fault) => Err((fault, self.zap(gone))),
        }
    }
}

impl<F: Format> Pages<F> {
    fn fill(
        &mut self,
        root: PageId,
        address: Gpa,
        access: Access,
        memory: &impl GuestMemory,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) -> Result<Filled, ShadowFault> {
        let found = walk(memory, self.table_of_root(root), address, access).map_err(ShadowFault::Guest)?;
        let (pfn, host_writable) =
            memory.translate(found.gfn, access).ok_or(ShadowFault::NoFrame(found.gfn))?;
        // The pages on the way are made first: making one can turn the very frame into a tracked one.
        let mut id = root;
        for level in (1..4).rev() {
            let entry = index(address, level + 1);
            let key = self.key_below(&found, level);
            id = match self.child(id, entry) {
                Some(child) if self.key(child) == key => child,
                _ => {
                    self.clear(id, entry, frames, gone);
                    let child = self.get_or_make(key, frames, Some(id), gone)?;
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
        let used = Use { accessed: true, dirty: access == Access::Write };
        let entry = index(address, 1);
        self.clear(id, entry, frames, gone);
        self.map(id, entry, (found.gfn, pfn), Attributes::new(permissions).with_use(used), frames);
        Ok(Filled::Mapped)
    }

    /// The key of the page of a level on the way to the leaf that the guest's tables lead to.
    fn key_below(&self, found: &GuestWalk, level: u8) -> Key {
        if let Some(&(table, _)) = found.tables.get(usize::from(4 - level)) {
            return self.key_of_table(table, level);
        }
        // The guest's leaf is larger: what it maps is broken up. Its permissions are in the leaves' key, since other
        // entries of the guest can lead to the same memory with others.
        let span = if level == 1 { PageSize::Size2M } else { PageSize::Size1G };
        let permissions = found.permissions;
        Key {
            gfn: Gfn::new(found.gfn.number() & !(span.pages() - 1)),
            level,
            direct: true,
            permissions: Permissions::bits(permissions),
            ..self.key_of_table(found.gfn, level)
        }
    }
}
