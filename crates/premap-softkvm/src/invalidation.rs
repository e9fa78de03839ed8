//! Sequence and retry: how the fault path learns that the host took pages away while it was looking.
//!
//! **Protocol.** Who changes the host's mappings first *begins* an invalidation of the guest pages concerned, then takes
//! their second-stage mappings away, then changes the host, then *ends* it, which moves the sequence on. Who makes a
//! mapping takes a snapshot of the sequence, then asks the host, and then, **under the lock of the leaf table that it
//! fills**, asks [`allows`](Invalidations::allows). If an invalidation of the page is in progress, or the sequence
//! moved, what the host said may be stale: it maps nothing and starts again.
//!
//! **Guarantee.** No second-stage mapping of a page survives the beginning of an invalidation of it, and none is made
//! between beginning and end. For either the check comes first, and then the mapping is there to be taken away; or the
//! taking away does, and then the check sees the beginning. That one of them comes first is premap-mmu's promise (the
//! fourth in its protocol), since there need not be a leaf table yet at whose lock the two would meet.
//!
//! Ranges in progress are merged to their hull, as in Linux: a page between two of them is held up needlessly.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use premap_address::Gfn;

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU64, fence},
};

/// The sequence at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence(u64);

/// Invalidations in progress.
#[derive(Debug, Default)]
struct InProgress {
    count: u64,
    hull: Option<Range<Gfn>>,
}

/// A VM's invalidations.
#[derive(Debug, Default)]
pub(crate) struct Invalidations {
    in_progress: Mutex<InProgress>,
    idle: Condvar,
    /// The count above, to be read without the lock.
    active: AtomicU64,
    sequence: AtomicU64,
}

impl Invalidations {
    fn lock(&self) -> MutexGuard<'_, InProgress> {
        self.in_progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sequence now. What is asked of the host afterwards is checked against it.
    pub(crate) fn snapshot(&self) -> Sequence {
        Sequence(self.sequence.load(Ordering::Acquire))
    }

    /// Whether pages may be mapped as the host told after `snapshot` was taken.
    pub(crate) fn allows(&self, snapshot: Sequence, pages: &Range<Gfn>) -> bool {
        if self.active.load(Ordering::Relaxed) != 0
            && let Some(hull) = &self.lock().hull
            && hull.start < pages.end
            && pages.start < hull.end
        {
            return false;
        }
        // After the look at what is in progress: an invalidation that ended before it has moved the sequence.
        fence(Ordering::Acquire);
        self.snapshot() == snapshot
    }

    /// Begins an invalidation that concerns no page yet. Slots change only while none is in progress.
    pub(crate) fn begin(&self) {
        let mut state = self.lock();
        state.count += 1;
        self.active.store(state.count, Ordering::Relaxed);
    }

    /// Adds pages to an invalidation that was begun.
    pub(crate) fn add(&self, pages: Range<Gfn>) {
        let mut state = self.lock();
        state.hull = Some(match state.hull.take() {
            None => pages,
            Some(hull) => hull.start.min(pages.start)..hull.end.max(pages.end),
        });
    }

    /// Ends an invalidation.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        // The sequence first: who sees nothing in progress any more then sees that it moved.
        self.sequence.fetch_add(1, Ordering::Release);
        state.count -= 1;
        self.active.store(state.count, Ordering::Release);
        if state.count == 0 {
            state.hull = None;
            self.idle.notify_all();
        }
    }

    /// Runs `publish` at a moment when no invalidation is in progress and none begins: one that began before new slots
    /// were there would not know their pages.
    pub(crate) fn when_idle(&self, publish: impl FnOnce()) {
        let mut state = self.lock();
        while state.count > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        publish();
    }
}

#[cfg(all(test, loom))]
mod loom_model;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pages(start: u64, end: u64) -> Range<Gfn> {
        Gfn::new(start)..Gfn::new(end)
    }

    #[test]
    fn pages_in_progress_and_everything_after_an_end_must_be_asked_again() {
        let invalidations = Invalidations::default();
        let before = invalidations.snapshot();
        invalidations.begin();
        invalidations.add(pages(10, 20));
        assert!(!invalidations.allows(before, &pages(19, 30)));
        assert!(invalidations.allows(before, &pages(20, 30)), "not concerned, and not ended yet");
        invalidations.end();
        assert!(!invalidations.allows(before, &pages(20, 30)), "the sequence moved");
        assert!(invalidations.allows(invalidations.snapshot(), &pages(10, 20)));
    }

    #[test]
    fn concurrent_ranges_merge_to_their_hull() {
        let invalidations = Invalidations::default();
        invalidations.begin();
        invalidations.add(pages(10, 20));
        invalidations.begin();
        invalidations.add(pages(40, 50));
        let now = invalidations.snapshot();
        assert!(!invalidations.allows(now, &pages(30, 31)));
        invalidations.end();
        invalidations.end();
        assert!(invalidations.allows(invalidations.snapshot(), &pages(30, 31)));
    }
}
