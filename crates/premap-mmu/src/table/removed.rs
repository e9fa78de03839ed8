//! What becomes of tables that were taken out: they are freed after a grace period, or with the page table.
// UNSAFETY: gives frames back to the caller's allocator.
#![expect(unsafe_code, reason = "gives back the frames of tables that nobody can reach")]

use alloc::vec::Vec;

use premap_address::Pfn;

use super::PageTable;
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::TablePage;
use crate::protocol::{Removed, look};

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Sends removed and flushed tables to the allocator after a grace period.
    pub(crate) fn retire(&self, tables: impl IntoIterator<Item = Removed>) {
        let frames = tables.into_iter().map(Removed::into_frame);
        self.epochs.retire(frames, |frame| self.free(frame));
    }

    /// Frees those removed tables whose grace period has ended since. Unmapping does so as well.
    pub fn collect(&self) {
        self.epochs.collect(|frame| self.free(frame));
    }

    /// Keeps tables of a dropped flush until the page table goes.
    pub(crate) fn park(&self, tables: impl IntoIterator<Item = Removed>) {
        self.parked.lock().extend(tables);
    }

    /// Private to this file: the frame came from `retire` and its grace period is over, or the page table goes.
    fn free(&self, frame: Pfn) {
        // SAFETY: the frame is of a table, so it came from this allocator. As a `Removed` it was unlinked, once, and the
        // epochs give it when nobody who could have found it before is left. On drop nobody else is there at all, and
        // the table is found once, in the tree or among those taken out.
        unsafe { self.frames.free(frame) }
    }

    /// Collects the frames of all tables linked below this one.
    fn tables_below(&self, page: &TablePage, level: u8, found: &mut Vec<Pfn>) {
        if level == 1 {
            return;
        }
        for word in page.words() {
            if let (_, Some(table)) = look::<F>(word, level) {
                self.tables_below(self.page_of(table), level - 1, found);
                found.push(table.frame());
            }
        }
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> Drop for PageTable<F, A, M> {
    fn drop(&mut self) {
        let mut gone = Vec::new();
        self.epochs.drain(|frame| gone.push(frame));
        gone.extend(self.parked.get_mut().drain(..).map(Removed::into_frame));
        self.tables_below(self.page_of_root(), self.levels.top(), &mut gone);
        gone.push(self.root);
        gone.into_iter().for_each(|frame| self.free(frame));
    }
}
