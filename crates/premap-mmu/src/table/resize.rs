//! Splitting large leaves and collapsing tables, over a range.
//!
//! Not for a table with a mirror: an external table has no such request here, so the calls do not exist there.

use premap_address::{GpaRange, PageSize};

use super::large::Stays;
use super::unmap::EndIn;
use super::{Changed, Obstacle, PageTable, Stopped};
use crate::attributes::{Attributes, Leaves, Use};
use crate::format::{Format, leaf_size};
use crate::frames::FrameAllocator;
use crate::mirror::NoMirror;
use crate::page::TablePage;
use crate::protocol::{Locked, State, leaf, look, state};

impl<F: Format, A: FrameAllocator> PageTable<F, A, NoMirror> {
    /// Splits every leaf of a range that is larger than `size`; a leaf covered in part is split as well.
    ///
    /// What is mapped does not change, and on most formats nothing is owed. Where a format asks for break-before-make, it
    /// stops with [`Obstacle::Frozen`] at each split: complete the flush and go on from there.
    pub fn split(&self, range: GpaRange, size: PageSize) -> Changed<'_, F, A, NoMirror> {
        let guard = self.epochs.pin();
        let mut done = Changed::nothing(self);
        let end = range.end_in(self.limit);
        let mut gpa = range.start();
        while gpa < end {
            let position = self.locate(&guard, gpa, 2);
            let larger = leaf_size(position.level).is_some_and(|leaf| leaf > size);
            if larger && state::<F>(position.raw, position.level) == State::Leaf {
                match self.split_for(&position, &mut done) {
                    Ok(()) => continue,
                    Err(obstacle) => {
                        done.stopped = Some(Stopped { gpa, obstacle });
                        break;
                    }
                }
            }
            gpa = position.end();
        }
        self.account(done.replacing, done.replaced);
        done
    }

    /// Makes one leaf of `size` of every table that maps a whole and aligned run of frames, all with the same permissions
    /// and memory type. Where a table does not, it stays: what is mapped does not change.
    ///
    /// The leaf counts as accessed, and as dirty if it may be written or an old one was: what the processor notes in an old entry at this
    /// very moment would be lost otherwise.
    ///
    /// # Panics
    /// There is no table to make a leaf of: the size is 4 KiB, or larger than the format has.
    pub fn collapse(&self, range: GpaRange, size: PageSize) -> Changed<'_, F, A, NoMirror> {
        assert!(size > PageSize::Size4K && size <= F::LARGEST, "{} has no {size} leaf above tables", F::NAME);
        let guard = self.epochs.pin();
        let mut done = Changed::nothing(self);
        let end = range.end_in(self.limit);
        let Some(mut gpa) = range.start().checked_align_up(size) else { return done };
        while gpa.checked_add(size.bytes()).is_some_and(|next| next <= end) {
            let next = gpa.wrapping_add(size.bytes());
            let position = self.locate(&guard, gpa, size.level());
            if position.level == size.level()
                && F::is_table(position.raw)
                && let Ok(locked) = position.slot::<F>().lock()
                && F::is_table(locked.value())
                && let Some((pfn, attributes)) = self.first_leaf(&locked, size)
                && pfn.is_aligned(size)
            {
                match self.collapsible(&locked, pfn, size) {
                    Ok(gone) if gone.leaves.pages() == size.pages() => {
                        if let Some(dirty) = gone.uniform(self, attributes) {
                            let dirty = dirty || attributes.permissions.writable();
                            let used = Use { accessed: true, dirty };
                            done.replaced += gone.leaves;
                            done.replacing += Leaves::of(size, 1);
                            let new = F::leaf(pfn, size, attributes.with_use(used));
                            self.replace_table(&position, locked, gone, new, &mut done.flush);
                        }
                    }
                    Ok(_) | Err(Stays::Other) => {}
                    Err(Stays::Frozen) => {
                        done.stopped = Some(Stopped { gpa, obstacle: Obstacle::Frozen });
                        break;
                    }
                }
            }
            gpa = next;
        }
        self.account(done.replacing, done.replaced);
        done
    }

    /// The first frame and the attributes of the first leaf below a table entry that is locked.
    fn first_leaf<'t>(
        &'t self,
        locked: &Locked<'t, F>,
        size: PageSize,
    ) -> Option<(premap_address::Pfn, Attributes<F>)> {
        let (mut raw, mut below) = (locked.value(), locked.below());
        let mut level = size.level();
        while let Some(table) = below {
            level -= 1;
            (raw, below) = look::<F>(self.page_of(table).word(0), level);
        }
        let found = leaf_size(level)?;
        (state::<F>(raw, level) == State::Leaf).then(|| (F::frame(raw, found), F::attributes(raw, found)))
    }
}

/// Whether any leaf of a table is dirty, or `None` if not all its leaves have these attributes, whatever their use.
pub(super) fn uniform_table<F: Format>(
    page: &TablePage,
    size: PageSize,
    attributes: Attributes<F>,
) -> Option<bool> {
    let mut dirty = false;
    for word in page.words() {
        let raw = leaf::load(word);
        if F::is_table(raw) && size != PageSize::Size4K {
            continue;
        }
        let found = F::attributes(raw, size);
        if !F::is_present(raw) || found.with_use(attributes.used) != attributes {
            return None;
        }
        dirty |= found.used.dirty;
    }
    Some(dirty)
}
