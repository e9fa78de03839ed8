//! Doing an operation on the table and on the map.

use std::convert::Infallible;

use premap_mmu::{
    Access, Attributes, Edges, Flush, Format, Gpa, GpaRange, Heap, Mapping, NoMirror, Obstacle, PAGE_SIZE,
    PageSize, PageTable, Permissions, Pfn, Present, Stopped, TracksUse, Use,
};

use super::{
    Area, FIRST, Model, Op, Page, Shift, WINDOW, at, edges, leaf_size, pages, permissions, present, size,
};

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
                let page = self.pages[page].as_mut().expect("compared before");
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
        mut operation: impl FnMut(GpaRange) -> (Flush<'t, F, Heap, NoMirror>, Option<Stopped<Infallible>>),
    ) -> Option<Stopped<Infallible>>
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
                let size = leaf_size(choice).min(F::LARGEST);
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
                    let own = &mut self.pages[page];
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
                    if let Some(page) = &mut self.pages[page] {
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
                    if let Some(page) = &mut self.pages[page] {
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
                let own = &mut self.pages[page];
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
    ) -> Option<Stopped<Infallible>> {
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
            match &mut own[page] {
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
            let differs = |page: u64| own[page].is_some_and(|there| there.pfn != pfn(page));
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
                    && let Some(there) = &mut own[page]
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
            let own = &mut self.pages[page];
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
                    && self.pages[*page].is_some()
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
            mine += u64::from(self.pages[page].take().is_some());
        }
        assert_eq!(gone, mine);
    }
}
