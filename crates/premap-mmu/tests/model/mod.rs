//! A plain map of pages, and operations that a page table and the map do side by side.
//!
//! The window lies across a 1 GiB boundary, so that operations there meet every level. The map knows pages and not leaves:
//! where an operation's reach depends on the size of a leaf, it asks the table for the leaves, whose pages it has compared
//! with its own before.

mod apply;

use premap_mmu::{
    Attributes, Edges, Format, Gpa, GpaRange, Heap, Levels, Mapping, PAGE_SIZE, PageSize, PageTable,
    Permissions, Pfn, Present,
};

/// The first page of the window: 4 MiB below 1 GiB.
pub(crate) const FIRST: u64 = (1 << 18) - 1024;
/// The pages of the window.
pub(crate) const WINDOW: u64 = 2048;
/// The pages that large operations reach: 2 GiB.
const UNIVERSE: u64 = 1 << 19;

/// An operation on the window, or on a whole GiB.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) enum Op {
    Map { area: Area, pfn: Shift, permissions: u8, cap: u8, present: u8 },
    Place { page: u16, size: u8, pfn: Shift, permissions: u8, present: u8, valid: bool },
    Fill { page: u16, pages: u16, step: u8, present: u8 },
    Cursor { page: u16, pages: u16, present: u8 },
    Unmap { area: Area, split: bool },
    Protect { area: Area, permissions: u8, split: bool },
    WriteProtect { area: Area, split: bool },
    ClearDirty { area: Area },
    ClearAccessed { area: Area },
    Touch { page: u16, access: u8 },
    Split { area: Area, size: u8 },
    Collapse { area: Area, size: u8 },
}

/// Where.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Area {
    /// Pages of the window: first and count.
    Pages(u16, u16),
    /// Blocks of 2 MiB of the window.
    Blocks(u8, u8),
    /// The first or the second GiB.
    Gib(bool),
}

/// A GiB is dear for the map of pages, so a fuzzer is given one rarely.
#[cfg(fuzzing)]
impl<'a> arbitrary::Arbitrary<'a> for Area {
    fn arbitrary(input: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match input.arbitrary()? {
            255_u8 => Self::Gib(input.arbitrary()?),
            0..=95 => Self::Blocks(input.arbitrary()?, input.arbitrary()?),
            _ => Self::Pages(input.arbitrary()?, input.arbitrary()?),
        })
    }
}

/// The frame of a page: its own number, moved by a whole number of GiB, or moved so that no large leaf fits.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) enum Shift {
    Same,
    Aligned,
    Odd,
}

/// What a page is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page<F: Format> {
    pfn: u64,
    attributes: Attributes<F>,
}

/// The map: blocks of 512 pages, made when something in them is mapped.
struct Pages<F: Format>(Vec<Option<Box<Block<F>>>>);

type Block<F> = [Option<Page<F>>; 512];

impl<F: Format> Pages<F> {
    const ABSENT: Option<Page<F>> = None;

    fn mapped(&self) -> u64 {
        self.0.iter().flatten().flat_map(|block| block.iter().flatten()).count() as u64
    }

    fn none_in(&self, pages: std::ops::Range<u64>) -> bool {
        let mut page = pages.start;
        while page < pages.end {
            let next = (page / 512 + 1) * 512;
            if self.0[index(page / 512)].is_some()
                && (page..next.min(pages.end)).any(|page| self[page].is_some())
            {
                return false;
            }
            page = next;
        }
        true
    }
}

impl<F: Format> std::ops::Index<u64> for Pages<F> {
    type Output = Option<Page<F>>;

    fn index(&self, page: u64) -> &Option<Page<F>> {
        match &self.0[index(page / 512)] {
            Some(block) => &block[index(page % 512)],
            None => &Self::ABSENT,
        }
    }
}

impl<F: Format> std::ops::IndexMut<u64> for Pages<F> {
    fn index_mut(&mut self, page: u64) -> &mut Option<Page<F>> {
        let block = self.0[index(page / 512)].get_or_insert_with(|| Box::new([None; 512]));
        &mut block[index(page % 512)]
    }
}

pub(crate) struct Model<F: Format> {
    table: PageTable<F, Heap>,
    pages: Pages<F>,
}

fn at(page: u64) -> Gpa {
    Gpa::new(page * PAGE_SIZE)
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("small")
}

fn size(choice: u8) -> PageSize {
    PageSize::ALL[usize::from(choice) % 3]
}

/// The size of a single leaf, rarely 1 GiB.
fn leaf_size(choice: u8) -> PageSize {
    if choice > 250 { PageSize::Size1G } else { size(choice % 2) }
}

fn permissions(choice: u8) -> Permissions {
    [Permissions::READ, Permissions::READ_WRITE, Permissions::READ_EXECUTE, Permissions::ALL]
        [usize::from(choice) % 4]
}

fn present(choice: u8) -> Present {
    [Present::Keep, Present::Collapse, Present::Rebuild][usize::from(choice) % 3]
}

fn edges(split: bool) -> Edges {
    if split { Edges::Split } else { Edges::Whole }
}

impl Area {
    fn range(self) -> GpaRange {
        let (first, pages) = match self {
            Self::Pages(first, pages) => {
                let first = u64::from(first) % WINDOW;
                (FIRST + first, 1 + u64::from(pages) % (WINDOW - first))
            }
            Self::Blocks(first, blocks) => {
                let first = u64::from(first) % 4;
                (FIRST + first * 512, 512 * (1 + u64::from(blocks) % (4 - first)))
            }
            Self::Gib(second) => (if second { 1 << 18 } else { 0 }, 1 << 18),
        };
        GpaRange::new(at(first), pages * PAGE_SIZE)
    }
}

impl Shift {
    fn frame(self, page: u64) -> u64 {
        match self {
            Self::Same => page,
            Self::Aligned => page + (4 << 18),
            Self::Odd => page + (8 << 18) + 1,
        }
    }
}

fn pages(range: GpaRange) -> std::ops::Range<u64> {
    range.start().frame().number()..range.end().frame().number()
}

impl<F: Format> Model<F> {
    pub(crate) fn new(levels: Levels) -> Self {
        let table = PageTable::new(Heap, levels).expect("the heap has a frame");
        Self { table, pages: Pages((0..UNIVERSE / 512).map(|_| None).collect()) }
    }

    /// Attributes as the format can hold them.
    fn normal(attributes: Attributes<F>, size: PageSize) -> Attributes<F> {
        F::attributes(F::leaf(Pfn::new(0), size, attributes), size)
    }

    fn leaves_in(&self, range: GpaRange) -> Vec<Mapping<F>> {
        let mut leaves = Vec::new();
        self.table.for_each(range, |leaf| leaves.push(leaf));
        leaves
    }

    /// Compares the window and a range with the table.
    fn compare(&self, range: GpaRange) {
        let window = GpaRange::new(at(FIRST), WINDOW * PAGE_SIZE);
        let outside = window.intersection(range) != Some(range);
        for part in [window].into_iter().chain(outside.then_some(range)) {
            let mut next = pages(part).start;
            let absent = |between: std::ops::Range<u64>| self.pages.none_in(between);
            self.table.for_each(part, |leaf| {
                let inside = leaf.range().intersection(part).expect("it touches the range");
                assert!(absent(next..pages(inside).start), "a mapping is missing before {leaf:?}");
                next = pages(inside).end;
                for page in pages(inside) {
                    let own = self.pages[page].unwrap_or_else(|| panic!("{leaf:?} is mapped"));
                    assert_eq!(leaf.translate(at(page)).expect("inside").frame().number(), own.pfn);
                    assert_eq!(leaf.attributes.with_use(own.attributes.used), own.attributes);
                    let (found, least) = (leaf.attributes.used, own.attributes.used);
                    assert!(found.accessed >= least.accessed && found.dirty >= least.dirty, "use was lost");
                }
            });
            assert!(absent(next..pages(part).end), "a mapping is missing at the end of {part}");
        }
    }

    /// Compares everything: pages, counts, walks, and what the range queries say.
    pub(crate) fn finish(&self) {
        let everything = GpaRange::new(at(0), UNIVERSE * PAGE_SIZE);
        self.compare(everything);
        let own = self.pages.mapped();
        assert_eq!((self.table.leaves().pages(), self.table.query(everything)), (own, self.table.leaves()));
        let mut stretched = 0;
        self.table.stretches(everything, |stretch| {
            stretched += stretch.range.pages();
            for (page, pfn) in pages(stretch.range).zip(stretch.pfn.number()..) {
                assert_eq!(self.pages[page].expect("mapped").pfn, pfn);
            }
        });
        assert_eq!(stretched, own);
        for page in (FIRST..FIRST + WINDOW).step_by(7) {
            assert_eq!(self.table.walk(at(page)).is_some(), self.pages[page].is_some());
        }
    }
}
