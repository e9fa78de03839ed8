//! Making second-stage mappings of what the host has, for faults and pre-faults alike: the last part of the protocol of
//! `invalidation`, and KVM's rules for what a mapping permits and how large it is.

use std::ops::Range;
use std::sync::Arc;

use premap_address::{Gfn, Gpa, GpaRange, PAGE_SIZE, PageSize, Pfn};
use premap_kvm::Errno;
use premap_mmu::shadow::Demand;
use premap_mmu::{Access, Attributes, Mapped, NoMirror, Npt, Obstacle, Permissions, Present, Use};

use crate::frames::Frames;
use crate::host::{Run, State};
use crate::invalidation::Sequence;
use crate::loaded::{Loaded, ShadowUse};
use crate::machine::Machine;
use crate::memslots::{Protection, Slot};
use crate::profile::PresentMapping;
use crate::roots::Root;
use crate::shadow::{HostPage, Placed};

/// Who asks for a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A guest that waits for it, and will have used it.
    Fault,
    /// Nobody yet.
    PreFault,
}

/// What was mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Pages from the first on that are mapped now.
    pub(crate) pages: u64,
    /// Whether anything changed.
    pub(crate) changed: bool,
}

/// The host's answer of the memory behind a page and some that follow, and the moment from which it is known to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) gfn: Gfn,
    pub(crate) run: Run,
    pub(crate) sequence: Sequence,
}

impl Answer {
    /// The frame that the second stage has for a page: that of its host-virtual address. The page may come before the
    /// answer's first, where a huge page does.
    fn frame(&self, gfn: Gfn) -> Pfn {
        let first = self.run.start.raw() / PAGE_SIZE;
        Pfn::new(first.wrapping_add(gfn.number().wrapping_sub(self.gfn.number())))
    }
}

impl Machine {
    /// Maps pages of a slot from `gfn` on, at most `pages`, as the run says that starts at `gfn`'s memory. Stops without an
    /// error, perhaps with no progress, where the answer may be stale: the caller asks the host again.
    ///
    /// # Errors
    /// ENOMEM: no memory for tables. ENOSPC: every shadow page is in use.
    pub(crate) fn map(
        &self,
        root: &Loaded,
        slot: &Slot,
        gfn: Gfn,
        pages: u64,
        answer: Answer,
        purpose: Purpose,
    ) -> Result<Progress, Errno> {
        let mut progress = Progress::default();
        let pages = pages.min(answer.run.pages);
        while progress.pages < pages {
            let at = Gfn::new(gfn.number() + progress.pages);
            let step = match root {
                Loaded::Tdp(root) => self.step(root, slot, at, pages - progress.pages, answer, purpose),
                Loaded::Shadow(used) => self.map_direct(used, slot, at, answer, purpose),
            }?;
            progress.changed |= step.changed;
            progress.pages += step.pages;
            if step.pages == 0 {
                break;
            }
        }
        Ok(progress)
    }

    /// Maps one huge page, or pages of one leaf table.
    fn step(
        &self,
        root: &Root,
        slot: &Slot,
        gfn: Gfn,
        pages: u64,
        answer: Answer,
        purpose: Purpose,
    ) -> Result<Progress, Errno> {
        let Answer { run, sequence, .. } = answer;
        let attributes = attributes(slot, &run, purpose);
        let present = self.present(purpose);
        let size = run.size.min(self.largest(slot, gfn));
        let (first, count) = if size > PageSize::Size4K {
            (gfn.align_down(size), size.pages())
        } else if slot.dirty.is_some() && present == Present::Collapse {
            // Only pages that this maps are dirty, and the table tells no more than how many those are.
            (gfn, 1)
        } else {
            (gfn, pages.min(PageSize::Size2M.pages() - gfn.number() % PageSize::Size2M.pages()))
        };
        let concerned = first..Gfn::new(first.number() + count);
        let small = size == PageSize::Size4K;
        let valid = || {
            !root.is_obsolete()
                && self.invalidations.allows(sequence, &concerned)
                && (small || !self.shadow.mmu.tracks(concerned.clone()))
        };
        let pfn = answer.frame(first);
        let range = GpaRange::new(first.address(), count * PAGE_SIZE);
        let done = if size > PageSize::Size4K {
            root.table.place(first.address(), size, pfn, attributes, present, valid)
        } else {
            root.table.fill(range, present, valid, |gpa| {
                Some((offset(pfn, range, gpa), self.untracked(gpa.frame(), attributes)))
            })
        };
        let kept = done.spurious > 0 && present == Present::Collapse;
        let mut step = self.settle(slot, &concerned, done, attributes, purpose)?;
        if kept && attributes.permissions.writable() && slot.dirty.is_none() {
            step.changed |= self.widen(root, range, size, pfn, attributes, valid)?;
        }
        // A huge page can begin before the first page asked for.
        Ok(Progress { pages: step.pages.saturating_sub(gfn.number() - first.number()), ..step })
    }

    /// Maps one page in a direct root of the shadow MMU.
    fn map_direct(
        &self,
        used: &ShadowUse,
        slot: &Slot,
        gfn: Gfn,
        answer: Answer,
        purpose: Purpose,
    ) -> Result<Progress, Errno> {
        let page = self.host_page(slot, gfn, answer);
        let demand = match purpose {
            Purpose::Fault if page.writable => Demand::Access(Access::Write),
            Purpose::Fault => Demand::Access(Access::Read),
            Purpose::PreFault => Demand::Ahead(self.present(purpose)),
        };
        let mut placed = self.place_shadow(used, gfn.address(), demand, page, None)?;
        let permits = || self.shadow.mmu.lookup(used.root, gfn.address()).map(|mapping| mapping.writable());
        if (purpose, placed) == (Purpose::PreFault, Placed::Spurious)
            && page.writable
            && slot.dirty.is_none()
            && permits() == Some(false)
        {
            // As `widen` does it, and for its reason.
            placed = self.place_shadow(used, gfn.address(), Demand::Ahead(Present::Rebuild), page, None)?;
        }
        Ok(match placed {
            Placed::Mapped(permissions) => {
                if permissions.writable() {
                    slot.mark_dirty(gfn, 1);
                }
                Progress { pages: 1, changed: true }
            }
            Placed::Spurious => Progress { pages: 1, changed: false },
            Placed::Emulate | Placed::Stale => Progress::default(),
        })
    }

    /// What the shadow MMU is told of a page of a slot.
    pub(crate) fn host_page(&self, slot: &Slot, gfn: Gfn, answer: Answer) -> HostPage<'_> {
        let writable = attributes(slot, &answer.run, Purpose::PreFault).permissions.writable();
        HostPage { machine: self, gfn, pfn: answer.frame(gfn), writable, sequence: answer.sequence }
    }

    /// What becomes of a mapping that is present.
    fn present(&self, purpose: Purpose) -> Present {
        match (purpose, self.rules().present_mapping) {
            (Purpose::Fault, _) | (Purpose::PreFault, PresentMapping::Rebuilt) => Present::Rebuild,
            (Purpose::PreFault, PresentMapping::Kept) => Present::Collapse,
        }
    }

    /// A page's attributes, without writing if it holds a table that is shadowed. To be asked under the lock of the leaf
    /// table.
    fn untracked(&self, gfn: Gfn, attributes: Attributes<Npt>) -> Attributes<Npt> {
        if !self.shadow.mmu.is_tracked(gfn) {
            return attributes;
        }
        Attributes { permissions: attributes.permissions.without_write(), ..attributes }
    }

    /// Makes read-only mappings writable that were found present and kept, now that the host's pages are writable.
    ///
    /// The host replaced those pages since they were mapped, without this VM's notifier being told (the VMM wrote to its
    /// own memory, or populated it). Linux is always told: there such a mapping was gone, and would be made anew here.
    fn widen(
        &self,
        root: &Root,
        range: GpaRange,
        size: PageSize,
        pfn: Pfn,
        attributes: Attributes<Npt>,
        valid: impl Fn() -> bool,
    ) -> Result<bool, Errno> {
        let narrow = |gpa| {
            let found = root.table.walk(gpa);
            let is_narrow = found.is_some_and(|found| found.page_size == size && !found.writable());
            is_narrow && !self.shadow.mmu.is_tracked(gpa.frame())
        };
        let done = if size > PageSize::Size4K {
            if !narrow(range.start()) {
                return Ok(false);
            }
            root.table.place(range.start(), size, pfn, attributes, Present::Rebuild, valid)
        } else {
            // Where a larger mapping was found there is nothing to widen, and a rebuild would split it.
            let pages = (0..range.pages()).map(|page| range.start().wrapping_add(page * PAGE_SIZE));
            if !pages.into_iter().any(narrow) {
                return Ok(false);
            }
            root.table.fill(range, Present::Rebuild, valid, |gpa| {
                narrow(gpa).then(|| (offset(pfn, range, gpa), attributes))
            })
        };
        let changed = done.rebuilt.total() > 0;
        done.flush.complete_by_waiting();
        // What stopped it is told to the next one who looks: these mappings permit less than they could, and no more.
        Ok(changed)
    }

    /// Completes what a mapping operation left to do.
    fn settle(
        &self,
        slot: &Slot,
        pages: &Range<Gfn>,
        done: Mapped<'_, Npt, Arc<Frames>, NoMirror>,
        attributes: Attributes<Npt>,
        purpose: Purpose,
    ) -> Result<Progress, Errno> {
        done.flush.complete_by_waiting();
        let changed = done.mapped.total() + done.rebuilt.total() + done.replaced.total() > 0;
        let end = match &done.stopped {
            None => pages.end,
            Some(stopped) => match stopped.obstacle {
                Obstacle::Frozen | Obstacle::Withdrawn => stopped.gpa.frame(),
                // Slots are never re-pointed while mapped, so this is a leaf that an unmap is about to take.
                Obstacle::Conflict => stopped.gpa.frame(),
                Obstacle::OutOfFrames => return Err(Errno::NOMEM),
                Obstacle::BeyondTable => return Err(Errno::FAULT),
                Obstacle::Refused(never) => match never {},
            },
        };
        let done = end.number() - pages.start.number();
        let rebuilds = self.rules().present_mapping == PresentMapping::Rebuilt;
        if attributes.permissions.writable() && (changed || rebuilds || purpose == Purpose::Fault) {
            slot.mark_dirty(pages.start, done);
        }
        Ok(Progress { pages: done, changed })
    }
}

/// The frame of a page in a range of which `first` is the first frame.
fn offset(first: Pfn, range: GpaRange, gpa: Gpa) -> Pfn {
    Pfn::new(first.number() + (gpa.frame().number() - range.start().frame().number()))
}

/// What KVM puts in a leaf (`make_spte`): writable where slot and host let it be, and then dirty as well; accessed only if
/// someone waits for it.
fn attributes(slot: &Slot, run: &Run, purpose: Purpose) -> Attributes<Npt> {
    let writable = slot.protection == Protection::Writable && run.state == State::Writable;
    let permissions = if writable { Permissions::ALL } else { Permissions::READ_EXECUTE };
    Attributes::new(permissions).with_use(Use { accessed: purpose == Purpose::Fault, dirty: writable })
}
