//! A TD's end: its key is freed, then every page of it is reclaimed.

use std::ops::Range;

use premap_address::{Gfn, Gpa, GpaRange, Hpa, PAGE_SIZE};
use premap_kvm::Errno;
use premap_mmu::{Edges, Obstacle};

use super::build::{Built, Td};
use super::errors::insist;
use super::lock;

impl Td {
    /// Takes pages from the TD, for what the host took away or made shared. Their content is lost.
    ///
    /// # Errors
    /// EIO: the module refuses to give one back. The VM is of no use then.
    pub(crate) fn unmap(&self, pages: &Range<Gfn>) -> Result<(), Errno> {
        self.reservations.withdraw(pages).into_iter().for_each(|page| self.host.free(page));
        let Some(built) = self.built.get() else { return Ok(()) };
        let count = pages.end.number().saturating_sub(pages.start.number());
        let mut rest = GpaRange::try_new(pages.start.address(), count * PAGE_SIZE).ok();
        while let Some(range) = rest {
            let done = built.table.unmap(range, Edges::Whole);
            done.flush.complete_by_waiting();
            let Some(stopped) = done.stopped else { break };
            if let Obstacle::Refused(_) = stopped.obstacle {
                // The mirror waits out a busy module by itself.
                return Err(Errno::IO);
            }
            std::thread::yield_now();
            let left = range.end().raw().saturating_sub(stopped.gpa.raw());
            rest = GpaRange::try_new(stopped.gpa, left).ok();
        }
        Ok(())
    }

    /// VPFLUSHDONE, KEY.FREEID, RECLAIM. The vCPUs were flushed when they went.
    pub(super) fn take_apart(&self, built: Built) {
        let module = &self.host.module;
        let reclaim = |page: Hpa| {
            let taken = insist(|| module.phymem_page_reclaim(page));
            debug_assert!(taken.is_ok(), "{page} of a TD: {taken:?}");
            if taken.is_ok() {
                self.host.free(page);
            }
        };
        let ended = insist(|| module.mng_vpflushdone(built.tdr))
            .and_then(|()| insist(|| module.mng_key_freeid(built.tdr)));
        debug_assert!(ended.is_ok(), "{ended:?}");
        let all = GpaRange::new(Gpa::new(0), built.table.levels().limit().raw());
        let mut leaves = Vec::new();
        built.table.for_each(all, |leaf| leaves.push(leaf.pfn.address()));
        leaves.into_iter().for_each(reclaim);
        built.secure().take_tables().into_iter().for_each(reclaim);
        let control = std::mem::take(&mut *lock(&built.control));
        control.into_iter().for_each(reclaim);
        reclaim(built.tdr);
        self.host.return_key(built.key);
    }
}

impl Drop for Td {
    fn drop(&mut self) {
        let everything = Gfn::new(0)..Gfn::new(u64::MAX);
        self.reservations.withdraw(&everything).into_iter().for_each(|page| self.host.free(page));
        if let Some(built) = self.built.take() {
            self.take_apart(built);
        }
    }
}
