//! Mapping page by page without finding the way anew each time.

use core::fmt;

use premap_address::{Gpa, PageSize, Pfn};

use crate::attributes::{Attributes, Mapping};
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::protocol::leaf;
use crate::table::{Found, LeafTable, Mapped, Obstacle, PageTable, Present, View};

/// Maps single 4 KiB pages, holding the lock of the leaf table that it is in.
///
/// The lock is given back when the cursor enters another block of 2 MiB, on [`release`](Self::release), and when it is
/// finished or dropped. Until then other mappers and unmappers of that block wait: a thread must not use another
/// operation of the same table while its own cursor holds a block, nor wait for a thread that might.
pub struct Cursor<'t, F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    // The lock goes before the view that keeps the table in place.
    block: Option<LeafTable<'t, F>>,
    view: View<'t, F, A, M>,
    present: Present,
    done: Mapped<'t, F, A, M>,
}

impl<F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for Cursor<'_, F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("block", &self.block.as_ref().map(|block| block.base))
            .field("present", &self.present)
            .finish_non_exhaustive()
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Opens a cursor. What it does is counted in [`leaves`](Self::leaves) when it is finished or dropped.
    pub fn cursor(&self, present: Present) -> Cursor<'_, F, A, M> {
        Cursor { block: None, view: self.view(), present, done: Mapped::nothing(self) }
    }
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> Cursor<'t, F, A, M> {
    /// Maps one page of 4 KiB. A larger leaf that is there stays, whatever [`Present`] says: that is spurious.
    ///
    /// # Errors
    /// The obstacle; the page is not mapped then.
    #[inline]
    pub fn map(&mut self, gpa: Gpa, pfn: Pfn, attributes: Attributes<F>) -> Result<(), Obstacle<M::Refusal>> {
        let table = self.view.table;
        loop {
            if let Some(block) = &self.block
                && block.spans(gpa)
            {
                return table.place_small(block, gpa, pfn, attributes, self.present, &mut self.done);
            }
            if !self.enter(gpa)? {
                self.done.spurious += 1;
                return Ok(());
            }
        }
    }

    /// The leaf that maps an address, read under the lock if the cursor is in that block.
    #[inline]
    #[must_use]
    pub fn query(&self, gpa: Gpa) -> Option<Mapping<F>> {
        match &self.block {
            Some(block) if block.spans(gpa) => PageTable::<F, A, M>::leaf_at(
                leaf::load(block.word(gpa)),
                1,
                gpa.align_down(PageSize::Size4K),
            ),
            _ => self.view.walk(gpa),
        }
    }

    /// Gives the lock back that the cursor holds, if it holds one.
    pub fn release(&mut self) {
        self.block = None;
    }

    /// Closes the cursor; says what it mapped, and the flush that is owed if it rebuilt anything.
    pub fn finish(mut self) -> Mapped<'t, F, A, M> {
        self.block = None;
        self.view.table.account(self.done.mapped, self.done.replaced);
        core::mem::replace(&mut self.done, Mapped::nothing(self.view.table))
    }

    /// Locks the block's leaf table; false if a larger leaf maps it.
    fn enter(&mut self, gpa: Gpa) -> Result<bool, Obstacle<M::Refusal>> {
        // One leaf table at a time: the lock order.
        self.block = None;
        Ok(match self.view.table.lock_leaf_table(&self.view.guard, gpa)? {
            Found::LeafTable(block) => {
                self.block = Some(block);
                true
            }
            Found::Leaf(_) => false,
        })
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> Drop for Cursor<'_, F, A, M> {
    fn drop(&mut self) {
        self.view.table.account(self.done.mapped, self.done.replaced);
    }
}
