//! Shadow pages: how they are told apart, made, and kept in number.
// UNSAFETY: shadow pages live in frames of the caller's allocator, reached by number.
#![expect(unsafe_code, reason = "shadow pages live in the caller's frames")]

mod entries;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ops::Range;

use premap_address::{Gfn, Pfn};

use super::{Gone, ShadowFault, Source, Tag};
use crate::attributes::Permissions;
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::page::TablePage;
use crate::table::NewTable;

/// Names a shadow page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(usize);

/// What makes two shadow pages the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// The guest's table, or for a direct page the first frame that it maps.
    pub(super) gfn: Gfn,
    pub(super) level: u8,
    /// The guest has no table there: the page breaks up a larger leaf of the guest.
    pub(super) direct: bool,
    /// What the entries above permit. Only direct pages bake it into their leaves.
    pub(super) permissions: u64,
    pub(super) tag: Tag,
    pub(super) generation: u64,
}

/// Whether making a page began to track a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tracking {
    Began,
    Unchanged,
}

struct ShadowPage {
    key: Key,
    frame: Pfn,
    /// Entries that point to this page.
    parents: Vec<(PageId, usize)>,
    /// vCPUs that walk from it.
    roots: usize,
    /// Writes to the guest's table since the page was last used to fill something.
    writes: u32,
}

/// What an entry of a shadow page holds, besides the word that the processor reads.
#[derive(Clone, Copy)]
enum Link {
    Page(PageId),
    Leaf(Gfn),
}

/// So many writes without a use make a table that is no longer one: its page goes.
const FLOOD: u32 = 3;

pub(crate) struct Pages<F> {
    slots: Vec<Option<ShadowPage>>,
    free: Vec<PageId>,
    by_key: BTreeMap<Key, PageId>,
    links: BTreeMap<(PageId, usize), Link>,
    reverse: BTreeMap<Gfn, Vec<(PageId, usize)>>,
    /// How many shadow pages each guest table has.
    tracked: BTreeMap<Gfn, usize>,
    /// Oldest first.
    pub(super) age: VecDeque<PageId>,
    leaves: u64,
    generation: u64,
    pub(super) limit: usize,
    format: PhantomData<F>,
}

/// Gives frames back after the flush that they waited for.
pub(super) fn free<A: FrameAllocator>(frames: &A, pages: impl IntoIterator<Item = Pfn>) {
    for frame in pages {
        // SAFETY: the frames were allocated from this allocator for shadow pages, are linked nowhere any more, and the
        // caller has flushed what the processors held of them, or is dropping the shadow as a whole.
        unsafe { frames.free(frame) }
    }
}

impl<F: Format> Pages<F> {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            links: BTreeMap::new(),
            reverse: BTreeMap::new(),
            tracked: BTreeMap::new(),
            age: VecDeque::new(),
            leaves: 0,
            generation: 0,
            limit,
            format: PhantomData,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.age.len()
    }

    pub(super) fn leaves(&self) -> u64 {
        self.leaves
    }

    pub(super) fn tracked_frames(&self) -> usize {
        self.tracked.len()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn next_generation(&mut self) {
        self.generation += 1;
    }

    pub(super) fn is_tracked(&self, gfn: Gfn) -> bool {
        self.tracked.contains_key(&gfn)
    }

    pub(super) fn tracks(&self, frames: Range<Gfn>) -> bool {
        self.tracked.range(frames).next().is_some()
    }

    pub(super) fn all_frames(&mut self) -> Vec<Pfn> {
        self.slots.drain(..).flatten().map(|page| page.frame).collect()
    }

    /// The key of a root's page.
    pub(super) fn key_of_root(&self, source: Source, tag: Tag) -> Key {
        let (gfn, level, direct) = match source {
            Source::Table(gfn) => (gfn, 4, false),
            Source::Direct(levels) => (Gfn::new(0), levels.top(), true),
        };
        let (permissions, generation) = (Permissions::ALL.bits(), self.generation);
        Key { gfn, level, direct, permissions, tag, generation }
    }

    fn page(&self, id: PageId) -> &ShadowPage {
        self.slots[id.0].as_ref().expect("ids name pages that live: links to a page go before it does")
    }

    fn page_mut(&mut self, id: PageId) -> &mut ShadowPage {
        self.slots[id.0].as_mut().expect("ids name pages that live: links to a page go before it does")
    }

    pub(super) fn frame(&self, id: PageId) -> Pfn {
        self.page(id).frame
    }

    /// A vCPU walks from the page.
    pub(super) fn hold(&mut self, id: PageId) {
        self.page_mut(id).roots += 1;
    }

    pub(super) fn let_go(&mut self, id: PageId) {
        self.page_mut(id).roots -= 1;
    }

    pub(super) fn is_root(&self, id: PageId) -> bool {
        self.page(id).roots != 0
    }

    pub(super) fn is_obsolete(&self, id: PageId) -> bool {
        self.page(id).key.generation != self.generation
    }

    /// Whether the page has not gone.
    pub(super) fn lives(&self, id: PageId) -> bool {
        self.slots[id.0].is_some()
    }

    /// The pages that shadow tables of the guest in these frames.
    pub(super) fn shadows_of(&self, tables: Range<Gfn>) -> Vec<PageId> {
        let first = |gfn| Key { gfn, level: 0, direct: false, permissions: 0, tag: Tag(0), generation: 0 };
        let keys = self.by_key.range(first(tables.start)..first(tables.end));
        keys.filter(|(key, _)| !key.direct).map(|(_, id)| *id).collect()
    }

    fn words<'a>(&self, id: PageId, frames: &'a impl FrameAllocator) -> &'a TablePage {
        // SAFETY: the frame was allocated and initialised when the page was made, and is given back only after the page
        // has gone from here; the caller holds the lock of all pages.
        unsafe { frames.pointer(self.page(id).frame).as_ref() }
    }

    /// The page of a key, made if there is none; the oldest goes if there are too many. `keep` is not evicted, nor is
    /// what leads to it. A table's page says whether it is the first of its frame.
    pub(super) fn get_or_make(
        &mut self,
        key: Key,
        frames: &impl FrameAllocator,
        keep: Option<PageId>,
        gone: &mut Gone,
    ) -> Result<(PageId, Tracking), ShadowFault> {
        if let Some(&id) = self.by_key.get(&key) {
            self.page_mut(id).writes = 0;
            return Ok((id, Tracking::Unchanged));
        }
        while self.len() >= self.limit {
            if !self.evict_oldest(frames, keep, gone) {
                return Err(ShadowFault::OutOfPages);
            }
        }
        let frame = NewTable::empty::<F>(frames).ok_or(ShadowFault::OutOfFrames)?.into_frame();
        let page = ShadowPage { key, frame, parents: Vec::new(), roots: 0, writes: 0 };
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            PageId(self.slots.len() - 1)
        });
        self.slots[id.0] = Some(page);
        self.by_key.insert(key, id);
        self.age.push_back(id);
        if key.direct {
            return Ok((id, Tracking::Unchanged));
        }
        let shadows = self.tracked.entry(key.gfn).or_insert(0);
        *shadows += 1;
        if *shadows > 1 {
            return Ok((id, Tracking::Unchanged));
        }
        gone.tracked.push(key.gfn);
        // Under every tag, for memory can lie at the same address under two.
        for (leaf, entry) in self.leaves_of(key.gfn..Gfn::new(key.gfn.number() + 1), |_| true) {
            self.protect(leaf, entry, frames, gone);
        }
        Ok((id, Tracking::Began))
    }
}
