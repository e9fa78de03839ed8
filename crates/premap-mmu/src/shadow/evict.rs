//! Making room: the oldest page first, everything at once by a new generation, and on the host's demand.

use super::pages::{PageId, Pages};
use super::{Gone, ShadowMmu, Zap};
use crate::format::Format;
use crate::frames::FrameAllocator;

impl<F: Format, A: FrameAllocator> ShadowMmu<F, A> {
    /// Makes every page obsolete at once. Roots had before [are obsolete](Self::is_obsolete): their vCPUs release them
    /// and get others. What is obsolete goes with [`zap_obsolete`](Self::zap_obsolete).
    pub fn invalidate_all(&self) {
        self.pages.lock().next_generation();
    }

    /// Zaps about `batch` obsolete pages that no vCPU walks from. Says whether more remain.
    pub fn zap_obsolete(&self, batch: usize) -> (Zap<'_, A>, More) {
        let (more, zap) = self.change(|pages, frames, gone| {
            while gone.pages.len() < batch {
                let Some(id) = pages.oldest(None, |pages, id| pages.is_obsolete(id)) else { break };
                pages.zap(id, frames, gone);
            }
            pages.oldest(None, |pages, id| pages.is_obsolete(id)).is_some()
        });
        (zap, if more { More::Remain } else { More::None })
    }

    /// Gives about `count` pages back to a host that is short of memory: obsolete ones, or else the oldest.
    pub fn shrink(&self, count: usize) -> Zap<'_, A> {
        self.change(|pages, frames, gone| {
            while gone.pages.len() < count {
                let obsolete = pages.oldest(None, |pages, id| pages.is_obsolete(id));
                let Some(id) = obsolete.or_else(|| pages.oldest(None, |_, _| true)) else { break };
                pages.zap(id, frames, gone);
            }
        })
        .1
    }

    /// Permits so many pages from now on. Where there are more, the oldest go, but for roots.
    pub fn set_limit(&self, limit: usize) -> Zap<'_, A> {
        self.change(|pages, frames, gone| {
            pages.limit = limit;
            while pages.len() > limit && pages.evict_oldest(frames, None, gone) {}
        })
        .1
    }
}

/// Whether work remains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum More {
    /// Nothing is left to do.
    None,
    /// There is more.
    Remain,
}

impl<F: Format> Pages<F> {
    /// Takes the oldest page out, with all below it; false if none can go.
    pub(super) fn evict_oldest(
        &mut self,
        frames: &impl FrameAllocator,
        keep: Option<PageId>,
        gone: &mut Gone,
    ) -> bool {
        let oldest = self.oldest(keep, |_, _| true);
        if let Some(id) = oldest {
            self.zap(id, frames, gone);
        }
        oldest.is_some()
    }

    /// The oldest page that is no root, does not lead to `keep`, and is wanted.
    fn oldest(&self, keep: Option<PageId>, wanted: impl Fn(&Self, PageId) -> bool) -> Option<PageId> {
        let mut ages = self.age.iter().copied();
        ages.find(|&id| {
            let kept = keep.is_some_and(|keep| self.leads_to(id, keep));
            !self.is_root(id) && !kept && wanted(self, id)
        })
    }

    /// Whether a walk from one page can come to another.
    fn leads_to(&self, from: PageId, to: PageId) -> bool {
        from == to || self.parents(to).iter().any(|&(parent, _)| self.leads_to(from, parent))
    }
}
