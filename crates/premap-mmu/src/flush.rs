//! The TLB flush that an operation owes, and what waits for it.
//!
//! **Protocol.** An operation that takes a translation away leaves its entries *frozen*: they map nothing, and nobody can
//! map anything there. It returns a [`Flush`]. The caller invalidates the range in every TLB that may hold it and says so
//! with [`complete`](Flush::complete), which thaws the entries and sends removed tables on their way to the allocator.
//!
//! **Guarantee.** Between two leaves of different frames at one address lies a completed flush. A flush that is dropped
//! leaves its entries frozen and its tables unfreed until the page table itself goes: wasteful, never wrong.

use alloc::vec::Vec;
use core::fmt;

use premap_address::{Gpa, GpaRange};

use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::TablePage;
use crate::protocol::{self, Removed};
use crate::table::PageTable;

/// A run of frozen entries, and what they become when the flush is done.
#[derive(Clone, Copy)]
struct Frozen<'t> {
    page: &'t TablePage,
    first: usize,
    count: usize,
    value: u64,
}

/// An owed TLB flush. Nothing new can be mapped where something was unmapped until it is completed.
#[must_use = "frozen entries stay frozen until the flush is completed"]
pub struct Flush<'t, F: Format, A: FrameAllocator, M: Mirror> {
    table: &'t PageTable<F, A, M>,
    /// The hull of all that changed: first byte and last byte.
    hull: Option<(u64, u64)>,
    frozen: Vec<Frozen<'t>>,
    removed: Vec<Removed>,
}

impl<F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for Flush<'_, F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flush")
            .field("range", &self.range())
            .field("frozen", &self.frozen.iter().map(|run| run.count).sum::<usize>())
            .field("removed", &self.removed.len())
            .finish()
    }
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> Flush<'t, F, A, M> {
    pub(crate) fn none(table: &'t PageTable<F, A, M>) -> Self {
        Self { table, hull: None, frozen: Vec::new(), removed: Vec::new() }
    }

    /// The range that the TLBs must forget, or `None` if nothing is owed. It covers all that changed and may cover more.
    #[must_use]
    pub fn range(&self) -> Option<GpaRange> {
        self.hull.map(|(first, last)| GpaRange::new(Gpa::new(first), last - first + 1))
    }

    /// Whether anything is owed.
    #[must_use]
    pub fn is_owed(&self) -> bool {
        self.hull.is_some()
    }

    /// Runs `invalidate` on the range, if anything is owed, and then thaws what waited for it.
    ///
    /// When `invalidate` returns, no processor may hold a translation or a cached table entry of the range.
    pub fn complete(mut self, invalidate: impl FnOnce(GpaRange)) {
        if let Some(range) = self.range() {
            invalidate(range);
        }
        self.thaw();
    }

    /// Completes the flush for software walkers: waits until every [`View`](crate::View) that lives now has gone, the way
    /// a shoot-down waits for each processor. The caller holds no view of its own.
    pub fn complete_by_waiting(self) {
        let table = self.table;
        self.complete(|_| table.synchronize());
    }

    /// Adds another flush of the same table, so that both are completed at once.
    ///
    /// # Panics
    /// The other flush is of another table.
    pub fn merge(&mut self, mut other: Self) {
        assert!(core::ptr::eq(self.table, other.table), "flushes of different tables");
        if let Some((first, last)) = other.hull {
            self.cover(first, last);
        }
        self.frozen.append(&mut other.frozen);
        self.removed.append(&mut other.removed);
    }

    fn thaw(&mut self) {
        for run in self.frozen.drain(..) {
            for index in run.first..run.first + run.count {
                protocol::thaw(run.page.word(index), run.value);
            }
        }
        if !self.removed.is_empty() {
            self.table.retire(self.removed.drain(..));
        }
    }

    fn cover(&mut self, first: u64, last: u64) {
        self.hull = Some(match self.hull {
            None => (first, last),
            Some((start, end)) => (start.min(first), end.max(last)),
        });
    }

    /// The entry at `gpa`, spanning so many bytes, changed.
    pub(crate) fn owe(&mut self, gpa: Gpa, bytes: u64) {
        self.cover(gpa.raw(), gpa.raw() + (bytes - 1));
    }

    /// The caller froze these entries; they become `value` when the flush is done.
    pub(crate) fn freeze(&mut self, page: &'t TablePage, first: usize, count: usize, value: u64) {
        if let Some(run) = self.frozen.last_mut()
            && core::ptr::eq(run.page, page)
            && run.first + run.count == first
            && run.value == value
        {
            run.count += count;
        } else {
            self.frozen.push(Frozen { page, first, count, value });
        }
    }

    /// The caller took this table out, if it is one.
    pub(crate) fn remove(&mut self, table: Option<Removed>) {
        self.removed.extend(table);
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> Drop for Flush<'_, F, A, M> {
    fn drop(&mut self) {
        let waiting = self.frozen.drain(..).filter_map(|run| Removed::never_linked::<F>(run.value));
        self.removed.extend(waiting);
        if !self.removed.is_empty() {
            self.table.park(self.removed.drain(..));
        }
    }
}
