//! Mapping page by page without finding the way anew each time.

use core::fmt;

use premap_address::{Gpa, PageSize, Pfn};

use crate::attributes::{Attributes, Mapping};
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::page::TablePage;
use crate::protocol::leaf;
use crate::table::{Found, LeafTable, Mapped, Obstacle, PageTable, Present, Stopped, View};

/// Not the first address of any block.
const NOWHERE: Gpa = Gpa::new(u64::MAX);

/// Maps single 4 KiB pages, holding the lock of the leaf table that it is in.
///
/// The lock is given back when the cursor enters another block of 2 MiB, on [`release`](Self::release), and when it is
/// finished or dropped. Until then other mappers and unmappers of that block wait: a thread must not use another
/// operation of the same table while its own cursor holds a block, nor wait for a thread that might.
pub struct Cursor<'t, F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    // The lock goes before the view that keeps the table in place.
    block: Option<LeafTable<'t, F>>,
    /// The block's first address, or one that no block has while there is none.
    base: Gpa,
    /// The block's entries, or any table's while there is none.
    page: &'t TablePage,
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
        Cursor {
            block: None,
            base: NOWHERE,
            page: self.page_of_root(),
            view: self.view(),
            present,
            done: Mapped::nothing(self),
        }
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Maps single 4 KiB pages in any order: a working set, say, most wanted first.
    ///
    /// In random order nearly all the time goes into waiting for the cache lines of leaf entries. So it walks some pages
    /// ahead of the one that it maps and asks for their lines, without a lock. It stops at the first obstacle.
    pub fn map_scattered(
        &self,
        pages: impl IntoIterator<Item = (Gpa, Pfn)>,
        attributes: Attributes<F>,
        present: Present,
    ) -> Mapped<'_, F, A, M> {
        /// How far to look ahead: as many misses as a core has under way at once, about.
        const AHEAD: usize = 8;
        let mut cursor = self.cursor(present);
        let mut pages = pages.into_iter();
        let mut ring: [Option<(Gpa, Pfn)>; AHEAD] = [None; AHEAD];
        let mut at = 0;
        let mut stopped = None;
        let mut empty = 0;
        while empty < AHEAD {
            let coming = pages.next();
            if let Some((gpa, _)) = coming {
                self.expect_write(&cursor.view.guard, gpa);
            }
            empty = if coming.is_some() { 0 } else { empty + 1 };
            let now = core::mem::replace(&mut ring[at], coming);
            at = (at + 1) % AHEAD;
            if let Some((gpa, pfn)) = now
                && let Err(obstacle) = cursor.map(gpa, pfn, attributes)
            {
                stopped = Some(Stopped { gpa, obstacle });
                break;
            }
        }
        let mut done = cursor.finish();
        done.stopped = stopped;
        done
    }
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> Cursor<'t, F, A, M> {
    /// Maps one page of 4 KiB. A larger leaf that is there stays, whatever [`Present`] says: that is spurious.
    ///
    /// # Errors
    /// The obstacle; the page is not mapped then.
    #[inline]
    pub fn map(&mut self, gpa: Gpa, pfn: Pfn, attributes: Attributes<F>) -> Result<(), Obstacle<M::Refusal>> {
        // The most common case, short enough for the caller's loop: a page of this block, and nothing there.
        if !M::ACTIVE && gpa.align_down(PageSize::Size2M) == self.base {
            let word = self.page.word(index(gpa, 1));
            if leaf::load(word) == F::ABSENT {
                leaf::install(word, F::leaf(pfn, PageSize::Size4K, attributes));
                self.done.mapped.size_4k += 1;
                return Ok(());
            }
        }
        self.map_anew(gpa, pfn, attributes)
    }

    /// Maps a page of another block whose leaf table exists, where nothing is; in random order that is most pages.
    #[inline(never)]
    fn map_anew(
        &mut self,
        gpa: Gpa,
        pfn: Pfn,
        attributes: Attributes<F>,
    ) -> Result<(), Obstacle<M::Refusal>> {
        if !M::ACTIVE && self.block.as_ref().is_none_or(|block| !block.spans(gpa)) {
            // One leaf table at a time: the lock order.
            self.release();
            if let Some(block) = self.view.table.try_lock_existing(&self.view.guard, gpa) {
                let installed = block.install_if_absent(gpa, || F::leaf(pfn, PageSize::Size4K, attributes));
                self.done.mapped.size_4k += u64::from(installed);
                self.hold(block);
                if installed {
                    return Ok(());
                }
            }
        }
        self.map_elsewhere(gpa, pfn, attributes)
    }

    /// Maps a page whose leaf table does not exist or is in use, or where something is.
    #[inline(never)]
    fn map_elsewhere(
        &mut self,
        gpa: Gpa,
        pfn: Pfn,
        attributes: Attributes<F>,
    ) -> Result<(), Obstacle<M::Refusal>> {
        let table = self.view.table;
        if self.block.as_ref().is_none_or(|block| !block.spans(gpa)) {
            // One leaf table at a time: the lock order.
            self.release();
            match table.lock_leaf_table(&self.view.guard, gpa, self.present)? {
                Found::LeafTable(block) => self.hold(block),
                Found::Leaf(_) | Found::Present => {
                    self.done.spurious += 1;
                    return Ok(());
                }
            }
        }
        match &self.block {
            Some(block) => table.place_small(block, gpa, pfn, attributes, self.present, &mut self.done),
            None => Ok(()),
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
        self.base = NOWHERE;
        self.block = None;
    }

    fn hold(&mut self, block: LeafTable<'t, F>) {
        (self.base, self.page) = (block.base, block.page);
        self.block = Some(block);
    }

    /// Closes the cursor; says what it mapped, and the flush that is owed if it rebuilt anything.
    pub fn finish(mut self) -> Mapped<'t, F, A, M> {
        self.release();
        self.view.table.account(self.done.mapped, self.done.replaced);
        core::mem::replace(&mut self.done, Mapped::nothing(self.view.table))
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> Drop for Cursor<'_, F, A, M> {
    fn drop(&mut self) {
        self.view.table.account(self.done.mapped, self.done.replaced);
    }
}
