//! Looking at ranges, lock-free.
//!
//! What is told was true of each leaf at some moment during the call, not of all of them at one moment.

use premap_address::{Gpa, GpaRange, PAGE_SIZE, PageSize, Pfn};

use super::unmap::EndIn;
use super::walk::View;
use super::{PageTable, Position};
use crate::attributes::{Attributes, Leaves, Mapping};
use crate::format::{Format, index, leaf_size};
use crate::frames::FrameAllocator;
use crate::mirror::Mirror;
use crate::page::TablePage;
use crate::protocol::{State, leaf, state};

/// Neighbouring leaves of one size that map neighbouring frames with the same permissions and memory type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stretch<F: Format> {
    /// The addresses they map.
    pub range: GpaRange,
    /// The frame of the first address.
    pub pfn: Pfn,
    /// The size of each leaf.
    pub page_size: PageSize,
    /// The first leaf's attributes. The others can differ from it in their use.
    pub attributes: Attributes<F>,
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Tells `found` of every leaf that maps something of a range, in ascending order.
    pub fn for_each(&self, range: GpaRange, found: impl FnMut(Mapping<F>)) {
        self.view().for_each(range, found);
    }

    /// Tells `found` of everything mapped in a range, neighbours that belong together as one.
    pub fn stretches(&self, range: GpaRange, found: impl FnMut(Stretch<F>)) {
        self.view().stretches(range, found);
    }

    /// The address of the first leaf of a size at or after an address.
    pub(crate) fn first_leaf_from(&self, gpa: Gpa, size: PageSize) -> Option<Gpa> {
        let view = self.view();
        let mut gpa = gpa;
        while gpa < self.limit {
            let position = self.locate(&view.guard, gpa, size.level());
            if position.level == size.level() && state::<F>(position.raw, position.level) == State::Leaf {
                return Some(position.base);
            }
            gpa = position.end();
        }
        None
    }

    /// How many leaves map something of a range.
    #[must_use]
    pub fn query(&self, range: GpaRange) -> Leaves {
        let view = self.view();
        let mut leaves = Leaves::NONE;
        view.visit(range, |part| match part {
            Part::Leaf(mapping) => leaves += Leaves::of(mapping.page_size, 1),
            Part::Table { page, first, count, .. } => {
                let words = page.words().iter().skip(first).take(count);
                leaves.size_4k += words.map(|word| u64::from(F::is_present(leaf::load(word)))).sum::<u64>();
            }
        });
        leaves
    }
}

/// A piece of a range: a large leaf, or the entries of a leaf table that lie in the range.
enum Part<'t, F: Format> {
    Leaf(Mapping<F>),
    Table { page: &'t TablePage, first: usize, count: usize, gpa: Gpa },
}

impl<'t, F: Format, A: FrameAllocator, M: Mirror> View<'t, F, A, M> {
    /// As [`PageTable::for_each`], with everything told still in reach of this view.
    pub fn for_each(&self, range: GpaRange, mut found: impl FnMut(Mapping<F>)) {
        self.visit(range, |part| match part {
            Part::Leaf(mapping) => found(mapping),
            Part::Table { page, first, count, gpa } => {
                let words = page.words().iter().skip(first).take(count);
                for (page, word) in (gpa.frame().number()..).zip(words) {
                    let base = premap_address::Gfn::new(page).address();
                    if let Some(mapping) = PageTable::<F, A, M>::leaf_at(leaf::load(word), 1, base) {
                        found(mapping);
                    }
                }
            }
        });
    }

    /// As [`PageTable::stretches`], with everything told still in reach of this view.
    pub fn stretches(&self, range: GpaRange, mut found: impl FnMut(Stretch<F>)) {
        let mut joined = Joined::<F> { current: None };
        self.visit(range, |part| match part {
            Part::Leaf(leaf) => {
                // The part of the leaf that lies in the range.
                if let Some(inside) = leaf.range().intersection(range)
                    && let Some(start) = leaf.translate(inside.start())
                {
                    let (pfn, page_size) = (start.frame(), leaf.page_size);
                    let stretch = Stretch { range: inside, pfn, page_size, attributes: leaf.attributes };
                    joined.add(stretch, &mut found);
                }
            }
            Part::Table { page, first, count, gpa } => {
                stretches_of_table::<F>(page, first, count, gpa, |stretch| joined.add(stretch, &mut found));
            }
        });
        joined.end(&mut found);
    }

    /// Tells `visitor` of each piece of a range where something may be mapped.
    fn visit(&self, range: GpaRange, mut visitor: impl FnMut(Part<'t, F>)) {
        let end = range.end_in(self.table.levels().limit());
        let mut gpa = range.start();
        while gpa < end {
            let position: Position<'t> = self.table.locate(&self.guard, gpa, 2);
            let next = position.end().min(end);
            match (state::<F>(position.raw, position.level), leaf_size(position.level)) {
                (State::Leaf, Some(_)) => {
                    let leaf = PageTable::<F, A, M>::leaf_at(position.raw, position.level, position.base);
                    leaf.into_iter().for_each(|leaf| visitor(Part::Leaf(leaf)));
                }
                _ => {
                    if let Some(table) = position.below {
                        let page = self.table.page_of(table);
                        let count = ((next.raw() - gpa.raw()) / PAGE_SIZE) as usize;
                        visitor(Part::Table { page, first: index(gpa, 1), count, gpa });
                    }
                }
            }
            gpa = next;
        }
    }
}

/// Finds the stretches in a part of one leaf table.
#[inline]
fn stretches_of_table<F: Format>(
    page: &TablePage,
    first: usize,
    count: usize,
    gpa: Gpa,
    mut found: impl FnMut(Stretch<F>),
) {
    let words = page.words();
    let end = (first + count).min(words.len());
    let mut at = first;
    while at < end {
        let raw = leaf::load(&words[at]);
        let start = at;
        at += 1;
        if !F::is_present(raw) {
            continue;
        }
        // The next word of the stretch has the next frame and the same other bits, whatever was noted of its use.
        let mut expected = (raw & !F::USE_BITS) + PAGE_SIZE;
        // Eight at a time without a branch between, then one by one to where it ends.
        for eight in words[at..end].chunks_exact(8) {
            let differs = eight.iter().fold((0, expected), |(differs, expected), word| {
                (differs | ((leaf::load(word) & !F::USE_BITS) ^ expected), expected + PAGE_SIZE)
            });
            if differs.0 != 0 {
                break;
            }
            expected = differs.1;
            at += 8;
        }
        for word in &words[at..end] {
            if leaf::load(word) & !F::USE_BITS != expected {
                break;
            }
            expected += PAGE_SIZE;
            at += 1;
        }
        let bytes = (at - start) as u64 * PAGE_SIZE;
        found(Stretch {
            range: GpaRange::new(gpa.wrapping_add((start - first) as u64 * PAGE_SIZE), bytes),
            pfn: F::frame(raw, PageSize::Size4K),
            page_size: PageSize::Size4K,
            attributes: F::attributes(raw, PageSize::Size4K),
        });
    }
}

/// Joins stretches over the borders of tables.
struct Joined<F: Format> {
    current: Option<Stretch<F>>,
}

impl<F: Format> Joined<F> {
    fn add(&mut self, next: Stretch<F>, found: &mut impl FnMut(Stretch<F>)) {
        if let Some(current) = &mut self.current {
            let joins = current.range.end() == next.range.start()
                && current.pfn.checked_add(current.range.pages()) == Some(next.pfn)
                && current.page_size == next.page_size
                && current.attributes.with_use(next.attributes.used) == next.attributes;
            if joins {
                let bytes = current.range.bytes() + next.range.bytes();
                current.range = GpaRange::new(current.range.start(), bytes);
                return;
            }
            found(*current);
        }
        self.current = Some(next);
    }

    fn end(self, found: &mut impl FnMut(Stretch<F>)) {
        if let Some(current) = self.current {
            found(current);
        }
    }
}
