//! A plain map of pages, and operations that a page table and the map do side by side.
//!
//! The window lies across a 1 GiB boundary, so that operations there meet every level. The map knows pages and not leaves:
//! where an operation's reach depends on the size of a leaf, it asks the table for the leaves, whose pages it has compared
//! with its own before.

use premap_mmu::{
    Access, Attributes, Edges, Flush, Format, Gpa, GpaRange, Heap, Levels, Mapping, NoMirror, Obstacle,
    PAGE_SIZE, PageSize, PageTable, Permissions, Pfn, Present, Stopped, TracksUse, Use,
};

/// The first page of the window: 4 MiB below 1 GiB.
pub(crate) const FIRST: u64 = (1 << 18) - 1024;
/// The pages of the window.
pub(crate) const WINDOW: u64 = 2048;
/// The pages that large operations reach: 2 GiB.
const UNIVERSE: u64 = 1 << 19;

/// An operation on the window, or on a whole GiB.
#[derive(Clone, Copy, Debug)]
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

/// The frame of a page: its own number, moved by a whole number of GiB, or moved so that no large leaf fits.
#[derive(Clone, Copy, Debug)]
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

pub(crate) struct Model<F: Format> {
    table: PageTable<F, Heap>,
    pages: Vec<Option<Page<F>>>,
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

impl<F: TracksUse> Model<F> {
    /// Does what only a format with access and dirty bits can, and says whether the operation was one of these.
    pub(crate) fn apply_tracking(&mut self, op: Op) -> bool {
        let (area, dirty) = match op {
            Op::ClearDirty { area } => (area, true),
            Op::ClearAccessed { area } => (area, false),
            _ => return false,
        };
        let range = area.range();
        let whole = self.leaves_in(range);
        let mut told = Vec::new();
        let tell = |leaf: Mapping<F>| told.push(leaf);
        let done = if dirty {
            self.table.test_and_clear_dirty(range, tell)
        } else {
            self.table.test_and_clear_accessed(range, tell)
        };
        assert_eq!((done.leaves.total(), done.stopped), (told.len() as u64, None));
        done.flush.complete(|_| ());
        for leaf in whole {
            let noted = told.iter().any(|told| told.gpa == leaf.gpa);
            for page in pages(leaf.range()) {
                let page = self.pages[index(page)].as_mut().expect("compared before");
                let used = &mut page.attributes.used;
                let flag = if dirty { &mut used.dirty } else { &mut used.accessed };
                assert!(noted || !*flag, "a use was lost");
                *flag = false;
            }
        }
        self.compare(range);
        true
    }
}

impl<F: Format> Model<F> {
    pub(crate) fn new(levels: Levels) -> Self {
        let table = PageTable::new(Heap, levels).expect("the heap has a frame");
        Self { table, pages: vec![None; index(UNIVERSE)] }
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

    /// The pages that an operation reaches: those of the range, or of every leaf that it touches.
    fn reach(&self, range: GpaRange, edges: Edges) -> Vec<u64> {
        match edges {
            Edges::Split => pages(range).collect(),
            Edges::Whole => self.leaves_in(range).iter().flat_map(|leaf| pages(leaf.range())).collect(),
        }
    }

    /// Does an operation over a range, completing flushes and going on wherever it stops for one of its own.
    fn drive<'t>(
        range: GpaRange,
        mut operation: impl FnMut(
            GpaRange,
        )
            -> (Flush<'t, F, Heap, NoMirror>, Option<Stopped<std::convert::Infallible>>),
    ) -> Option<Stopped<std::convert::Infallible>>
    where
        F: 't,
    {
        let mut rest = range;
        loop {
            let (flush, stopped) = operation(rest);
            let owed = flush.is_owed();
            flush.complete(|_| ());
            match stopped {
                Some(Stopped { gpa, obstacle: Obstacle::Frozen }) if F::BREAK_BEFORE_MAKE && owed => {
                    rest = GpaRange::new(gpa, rest.end().raw() - gpa.raw());
                }
                other => return other,
            }
        }
    }

    /// Does an operation on both sides, and compares them.
    pub(crate) fn apply(&mut self, op: Op) {
        let range = match op {
            Op::Map { area, pfn, permissions: choice, cap, present: policy } => {
                let range = area.range();
                let attributes = Attributes::new(permissions(choice));
                let stopped = self.map(
                    range,
                    |page| pfn.frame(page),
                    attributes,
                    present(policy),
                    |table, part| {
                        let first = Pfn::new(pfn.frame(part.start().frame().number()));
                        table.map(part, first, attributes, size(cap), present(policy))
                    },
                );
                assert!(stopped.is_none_or(|stopped| stopped.obstacle == Obstacle::Conflict));
                range
            }
            Op::Place { page, size: choice, pfn, permissions: access, present: policy, valid } => {
                let size = size(choice).min(F::LARGEST);
                let gpa = at(FIRST + u64::from(page) % WINDOW).align_down(size);
                let pfn = |page| if let Shift::Odd = pfn { page } else { pfn.frame(page) };
                let range = GpaRange::new(gpa, size.bytes());
                let attributes = Attributes::new(permissions(access));
                let frame = Pfn::new(pfn(gpa.frame().number()));
                let stopped = self.map(range, pfn, attributes, present(policy), |table, part| {
                    // What a split left to do is of smaller pages.
                    if part == range {
                        table.place(gpa, size, frame, attributes, present(policy), || valid)
                    } else {
                        let first = Pfn::new(pfn(part.start().frame().number()));
                        table.map(part, first, attributes, size, present(policy))
                    }
                });
                assert!(stopped.is_none_or(|stopped| stopped.obstacle == Obstacle::Conflict || !valid));
                range
            }
            Op::Fill { page, pages: count, step, present: policy } => {
                let first = u64::from(page) % WINDOW;
                let count = 1 + u64::from(count) % (512 - first % 512);
                let range = GpaRange::new(at(FIRST + first), count * PAGE_SIZE);
                self.fill(range, 1 + u64::from(step) % 7, present(policy));
                range
            }
            Op::Cursor { page, pages: count, present: policy } => {
                let range = Area::Pages(page, count).range();
                let attributes = Attributes::new(Permissions::ALL);
                let mut cursor = self.table.cursor(present(policy));
                for page in pages(range) {
                    let before = cursor.query(at(page));
                    let result = cursor.map(at(page), Pfn::new(page), attributes);
                    let own = &mut self.pages[index(page)];
                    let larger = before.is_some_and(|leaf| leaf.page_size != PageSize::Size4K);
                    assert_eq!(before.is_some(), own.is_some());
                    match (before, present(policy)) {
                        (Some(leaf), Present::Rebuild) if !larger && leaf.pfn.number() != page => {
                            assert_eq!(result, Err(Obstacle::Conflict));
                        }
                        (Some(_), policy) if larger || policy != Present::Rebuild => {
                            assert_eq!(result, Ok(()))
                        }
                        _ => {
                            let attributes = Self::normal(attributes, PageSize::Size4K);
                            *own = Some(Page { pfn: page, attributes });
                            assert_eq!(result, Ok(()));
                        }
                    }
                }
                cursor.finish().flush.complete(|_| ());
                range
            }
            Op::Unmap { area, split } => {
                let range = area.range();
                self.unmap(range, edges(split));
                range
            }
            Op::Protect { area, permissions: choice, split } => {
                let range = area.range();
                let permissions = permissions(choice);
                let reached = self.reach(range, edges(split));
                let stopped = Self::drive(range, |part| {
                    let done = self.table.protect(part, permissions, edges(split));
                    (done.flush, done.stopped)
                });
                assert_eq!(stopped, None);
                for page in reached {
                    if let Some(page) = &mut self.pages[index(page)] {
                        let attributes = Attributes { permissions, ..page.attributes };
                        page.attributes = Self::normal(attributes, PageSize::Size4K);
                    }
                }
                range
            }
            Op::WriteProtect { area, split } => {
                let range = area.range();
                let reached = self.reach(range, edges(split));
                let stopped = Self::drive(range, |part| {
                    let done = self.table.write_protect(part, edges(split));
                    (done.flush, done.stopped)
                });
                assert_eq!(stopped, None);
                for page in reached {
                    if let Some(page) = &mut self.pages[index(page)] {
                        let raw = F::leaf(Pfn::new(0), PageSize::Size4K, page.attributes);
                        page.attributes = F::attributes(F::write_protected(raw), PageSize::Size4K);
                    }
                }
                range
            }
            Op::Touch { page, access } => {
                let page = FIRST + u64::from(page) % WINDOW;
                let access = [Access::Read, Access::Write, Access::Execute][usize::from(access) % 3];
                let result = self.table.view().access(at(page), access);
                let own = &mut self.pages[index(page)];
                let allowed = own.is_some_and(|page| page.attributes.permissions.permits(access));
                assert_eq!(result.is_ok(), allowed, "{result:?}");
                if let Some(page) = own.as_mut().filter(|_| allowed) {
                    let raw = F::leaf(Pfn::new(0), PageSize::Size4K, page.attributes);
                    let touched = F::touch(raw, access).expect("allowed");
                    page.attributes = F::attributes(touched, PageSize::Size4K);
                }
                GpaRange::new(at(page), PAGE_SIZE)
            }
            Op::Split { area, size: choice } => {
                let range = area.range();
                let stopped = Self::drive(range, |part| {
                    let done = self.table.split(part, size(choice));
                    assert_eq!(done.replaced.pages(), done.replacing.pages());
                    (done.flush, done.stopped)
                });
                assert_eq!(stopped, None);
                let small = |leaf: &Mapping<F>| leaf.page_size <= size(choice);
                assert!(self.leaves_in(range).iter().all(small));
                range
            }
            Op::Collapse { area, size: choice } => {
                let range = area.range();
                let size = size(choice).clamp(PageSize::Size2M, F::LARGEST);
                let done = self.table.collapse(range, size);
                assert_eq!((done.replaced.pages(), done.stopped), (done.replacing.pages(), None));
                done.flush.complete(|_| ());
                range
            }
            Op::ClearDirty { .. } | Op::ClearAccessed { .. } => return,
        };
        self.compare(range);
    }

    fn map<'t>(
        &'t mut self,
        range: GpaRange,
        pfn: impl Fn(u64) -> u64,
        attributes: Attributes<F>,
        present: Present,
        operation: impl Fn(&'t PageTable<F, Heap>, GpaRange) -> premap_mmu::Mapped<'t, F, Heap, NoMirror>,
    ) -> Option<Stopped<std::convert::Infallible>> {
        let Self { table, pages: own } = self;
        let (mut mapped, mut replaced, mut spurious) = (0, 0, 0);
        let stopped = Self::drive(range, |part| {
            let done = operation(table, part);
            mapped += done.mapped.pages();
            replaced += done.replaced.pages();
            spurious += done.spurious;
            (done.flush, done.stopped)
        });
        let end = stopped.map_or(range.end(), |stopped| stopped.gpa);
        let (mut new, mut old) = (0, 0);
        let attributes = Self::normal(attributes, PageSize::Size4K);
        for page in range.start().frame().number()..end.frame().number() {
            let mapping = Page { pfn: pfn(page), attributes };
            match &mut own[index(page)] {
                none @ None => {
                    *none = Some(mapping);
                    new += 1;
                }
                Some(there) => {
                    old += 1;
                    if present == Present::Rebuild {
                        assert_eq!(there.pfn, mapping.pfn, "a conflict was passed by");
                        there.attributes = attributes;
                    }
                }
            }
        }
        if let Some(Stopped { gpa, obstacle: Obstacle::Conflict }) = stopped {
            let differs = |page: u64| own[index(page)].is_some_and(|there| there.pfn != pfn(page));
            assert!((gpa.frame().number()..range.end().frame().number()).any(differs), "no conflict");
        }
        assert_eq!(mapped - replaced, new);
        assert!(present != Present::Keep || spurious == old, "{spurious} told as spurious of {old}");
        // A table that gave way to a larger leaf took its own attributes along.
        for leaf in {
            let mut leaves = Vec::new();
            table.for_each(range, |leaf| leaves.push(leaf));
            leaves
        } {
            for page in pages(leaf.range()) {
                if present != Present::Keep
                    && leaf.page_size != PageSize::Size4K
                    && let Some(there) = &mut own[index(page)]
                {
                    let used = there.attributes.used;
                    let used = Use {
                        accessed: used.accessed && leaf.attributes.used.accessed,
                        dirty: used.dirty && leaf.attributes.used.dirty,
                    };
                    there.attributes = leaf.attributes.with_use(used);
                }
            }
        }
        stopped
    }

    fn fill(&mut self, range: GpaRange, step: u64, present: Present) {
        let attributes = Attributes::new(Permissions::READ_WRITE);
        let leaf = |gpa: Gpa| {
            let page = gpa.frame().number();
            page.is_multiple_of(step).then(|| (Pfn::new(page), attributes))
        };
        let before: Vec<_> = self.leaves_in(range);
        let stopped = Self::drive(range, |part| {
            let done = self.table.fill(part, present, || true, leaf);
            (done.flush, done.stopped)
        });
        let end = stopped.map_or(range.end(), |stopped| stopped.gpa);
        assert!(stopped.is_none_or(|stopped| stopped.obstacle == Obstacle::Conflict));
        let under_large = before.first().is_some_and(|leaf| leaf.page_size != PageSize::Size4K)
            && present != Present::Rebuild;
        for page in range.start().frame().number()..end.frame().number() {
            let own = &mut self.pages[index(page)];
            if page.is_multiple_of(step) && !under_large && (own.is_none() || present == Present::Rebuild) {
                let attributes = Self::normal(attributes, PageSize::Size4K);
                *own = Some(Page { pfn: page, attributes });
            }
        }
    }

    fn unmap(&mut self, range: GpaRange, edges: Edges) {
        let reached = self.reach(range, edges);
        let mut gone = 0;
        let stopped = Self::drive(range, |part| {
            let done = self.table.unmap(part, edges);
            gone += done.leaves.pages();
            if let (Some(hull), true) = (done.flush.range(), done.stopped.is_none()) {
                // Until the flush is done nothing else is mapped there.
                if let Some(page) = reached.iter().find(|page| hull.contains(at(**page)))
                    && self.pages[index(*page)].is_some()
                    && self.table.walk(at(*page)).is_none()
                {
                    let other = Attributes::new(Permissions::READ);
                    let early = self.table.place(
                        at(*page),
                        PageSize::Size4K,
                        Pfn::new(1),
                        other,
                        Present::Keep,
                        || true,
                    );
                    assert_eq!(early.stopped.map(|stopped| stopped.obstacle), Some(Obstacle::Frozen));
                }
            }
            (done.flush, done.stopped)
        });
        assert_eq!(stopped, None);
        let mut mine = 0;
        for page in reached {
            mine += u64::from(self.pages[index(page)].take().is_some());
        }
        assert_eq!(gone, mine);
    }

    /// Compares the window and a range with the table.
    fn compare(&self, range: GpaRange) {
        let window = GpaRange::new(at(FIRST), WINDOW * PAGE_SIZE);
        for part in [window, range] {
            let mut next = pages(part).start;
            let absent =
                |mut between: std::ops::Range<u64>| between.all(|page| self.pages[index(page)].is_none());
            self.table.for_each(part, |leaf| {
                let inside = leaf.range().intersection(part).expect("it touches the range");
                assert!(absent(next..pages(inside).start), "a mapping is missing before {leaf:?}");
                next = pages(inside).end;
                for page in pages(inside) {
                    let own = self.pages[index(page)].unwrap_or_else(|| panic!("{leaf:?} is mapped"));
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
        let own = self.pages.iter().flatten().count() as u64;
        assert_eq!((self.table.leaves().pages(), self.table.query(everything)), (own, self.table.leaves()));
        let mut stretched = 0;
        self.table.stretches(everything, |stretch| {
            stretched += stretch.range.pages();
            for (page, pfn) in pages(stretch.range).zip(stretch.pfn.number()..) {
                assert_eq!(self.pages[index(page)].expect("mapped").pfn, pfn);
            }
        });
        assert_eq!(stretched, own);
        for page in (FIRST..FIRST + WINDOW).step_by(7) {
            assert_eq!(self.table.walk(at(page)).is_some(), self.pages[index(page)].is_some());
        }
    }
}
