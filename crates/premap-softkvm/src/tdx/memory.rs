//! A TD's memory: reserved, added, augmented. Each works on pages of one block of 2 MiB, under its leaf table's lock.

use std::ops::Range;

use premap_address::{Gfn, GpaRange, PAGE_SIZE, PageSize, Pfn};
use premap_kvm::Errno;
use premap_mmu::{Attributes, Leaves, Obstacle, Permissions, Present, SecureEpt, Stopped};
use premap_tdx::measure::CHUNK;
use premap_tdx_module::{Failure, PageInfo};

use super::build::{Built, Td};
use super::errors::{is_busy, refused};
use super::mirror::Refusal;
use super::{Page, lock};
use premap_kvm::tdx::TdxError;

/// How a page is added.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addition<'s> {
    pub(super) gfn: Gfn,
    /// The page's content.
    pub(super) source: &'s Page,
    pub(super) measured: bool,
}

/// The pages from `gfn` on that lie in its block, at most `pages`.
fn in_block(gfn: Gfn, pages: u64) -> Range<Gfn> {
    let block = PageSize::Size2M.pages();
    let end = (gfn.number() + pages).min((gfn.number() / block + 1) * block);
    gfn..Gfn::new(end)
}

fn range(pages: &Range<Gfn>) -> GpaRange {
    GpaRange::new(pages.start.address(), (pages.end.number() - pages.start.number()) * PAGE_SIZE)
}

fn attributes() -> Attributes<SecureEpt> {
    Attributes::new(Permissions::ALL)
}

/// How many pages were done before an operation stopped, or why there is no use in trying again.
fn progress(pages: &Range<Gfn>, stopped: Option<Stopped<Refusal>>) -> Result<u64, TdxError> {
    let Some(Stopped { gpa, obstacle }) = stopped else {
        return Ok(pages.end.number() - pages.start.number());
    };
    let done = gpa.frame().number() - pages.start.number();
    match obstacle {
        _ if done > 0 => Ok(done),
        Obstacle::Frozen | Obstacle::Withdrawn | Obstacle::Conflict => Ok(0),
        Obstacle::OutOfFrames => Err(Errno::NOMEM.into()),
        Obstacle::BeyondTable => Err(Errno::FAULT.into()),
        Obstacle::Refused(Refusal::Module(failure)) if is_busy(&failure) => Ok(0),
        Obstacle::Refused(Refusal::Module(failure)) => Err(refused(&failure)),
        Obstacle::Refused(Refusal::Host(errno)) => Err(errno.into()),
        Obstacle::Refused(Refusal::NotAdded) => Err(Errno::IO.into()),
    }
}

impl Td {
    /// Builds the Secure-EPT for pages and sets memory aside for them; gives how many of them are done, which may be none
    /// where something is in the way.
    pub(crate) fn reserve(&self, gfn: Gfn, pages: u64, valid: impl FnMut() -> bool) -> Result<u64, Errno> {
        let built = self.built()?;
        let pages = in_block(gfn, pages);
        self.reservations.with(gfn, |block| {
            let mut failed = None;
            let mut memory = self.host.supply(gfn);
            // A leaf comes to be under the block's lock only, which is held.
            let empty = built.table.query(range(&pages)) == Leaves::NONE;
            let done = built.table.fill(range(&pages), Present::Keep, valid, |gpa| {
                let page = gpa.frame();
                let wanted = block.get(page).is_none() && (empty || built.table.walk(gpa).is_none());
                if failed.is_none() && wanted {
                    match memory.next() {
                        Ok(memory) => block.reserve(page, memory),
                        Err(errno) => failed = Some((page, errno)),
                    }
                }
                None
            });
            match failed {
                None => progress(&pages, done.stopped).map_err(|error| error.errno),
                Some((page, errno)) if page == gfn => Err(errno),
                Some((page, _)) => Ok(page.number() - gfn.number()),
            }
        })
    }

    /// Adds a page that was reserved, with its source as an argument; measures it if asked.
    pub(super) fn add_reserved(
        &self,
        addition: Addition<'_>,
        valid: impl FnMut() -> bool,
    ) -> Result<bool, TdxError> {
        let built = self.built()?;
        let gfn = addition.gfn;
        let added = self.reservations.with(gfn, |block| {
            let memory = block.get(gfn).ok_or(Errno::IO)?;
            let mut refusal = None;
            let pages = in_block(gfn, 1);
            let done = built.table.fill(range(&pages), Present::Keep, valid, |gpa| {
                let page = PageInfo::page(gpa);
                match self.host.module.mem_page_add(page, built.tdr, memory, addition.source) {
                    Ok(()) => Some((memory.frame(), attributes())),
                    Err(failure) => {
                        refusal = Some(failure);
                        None
                    }
                }
            });
            if let Some(failure) = refusal {
                return Err(refused(&failure));
            }
            let added = progress(&pages, done.stopped)? > 0;
            if added {
                block.take(gfn);
            }
            Ok(added)
        })?;
        if added && addition.measured {
            self.measure(built, gfn).map_err(|failure| refused(&failure))?;
        }
        Ok(added)
    }

    /// Maps and adds a page at once, with its source in a field of the VM; measures it if asked. The caller holds the
    /// state's guard.
    pub(super) fn map_and_add(
        &self,
        addition: Addition<'_>,
        valid: impl FnMut() -> bool,
    ) -> Result<bool, TdxError> {
        let built = self.built()?;
        let put = |source| *lock(&built.secure().source) = source;
        put(Some(Box::new(*addition.source)));
        let added = self.place(built, addition.gfn, 1, valid);
        put(None);
        let added = added? > 0;
        if added && addition.measured {
            self.measure(built, addition.gfn).map_err(|failure| refused(&failure))?;
        }
        Ok(added)
    }

    /// Gives a TD that runs pages to accept; tells how many from `gfn` on are there, which may be none where something is in
    /// the way.
    pub(crate) fn augment(&self, gfn: Gfn, pages: u64, valid: impl FnMut() -> bool) -> Result<u64, Errno> {
        self.place(self.built()?, gfn, pages, valid).map_err(|error| error.errno)
    }

    /// Maps pages, of new memory, that are absent.
    fn place(
        &self,
        built: &Built,
        gfn: Gfn,
        pages: u64,
        valid: impl FnMut() -> bool,
    ) -> Result<u64, TdxError> {
        let pages = in_block(gfn, pages);
        let mut last = None;
        let mut failed = None;
        let mut supply = self.host.supply(gfn);
        let done = built.table.fill(range(&pages), Present::Keep, valid, |gpa| {
            if failed.is_some() || built.table.walk(gpa).is_some() {
                return None;
            }
            match supply.next() {
                Ok(memory) => {
                    last = Some(memory);
                    Some((memory.frame(), attributes()))
                }
                Err(errno) => {
                    failed = Some((gpa.frame(), errno));
                    None
                }
            }
        });
        if let (Some(stopped), Some(memory)) = (&done.stopped, last)
            && matches!(stopped.obstacle, Obstacle::Refused(_))
            && !self.is_given(memory.frame(), built)
        {
            self.host.free(memory);
        }
        match failed {
            Some((at, errno)) if at == gfn => Err(errno.into()),
            Some((at, _)) => Ok(at.number() - gfn.number()),
            None => progress(&pages, done.stopped),
        }
    }

    fn is_given(&self, page: Pfn, built: &Built) -> bool {
        self.host.is_given(page, built.tdr)
    }

    /// MR.EXTEND of a whole page.
    fn measure(&self, built: &Built, gfn: Gfn) -> Result<(), Failure> {
        let offsets = (0..PAGE_SIZE).step_by(CHUNK);
        for gpa in offsets.map(|offset| gfn.address().wrapping_add(offset)) {
            super::errors::insist(|| self.host.module.mr_extend(gpa, built.tdr))?;
        }
        Ok(())
    }
}
