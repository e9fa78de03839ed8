//! The entries of shadow pages: what links pages, what maps frames, and how either goes.

use alloc::vec::Vec;
use core::ops::Range;

use premap_address::{Gfn, Gpa, PageSize, Pfn};

use super::{FLOOD, Key, Link, PageId, Pages, Tag};
use crate::attributes::{Access, Attributes, Mapping, Permissions};
use crate::format::{Format, index};
use crate::frames::FrameAllocator;
use crate::page::WORDS;
use crate::protocol::{leaf, touch};
use crate::shadow::Gone;
use crate::sync::AtomicU64;

impl<F: Format> Pages<F> {
    /// The page that an entry points to.
    pub(in crate::shadow) fn child(&self, id: PageId, entry: usize) -> Option<PageId> {
        match self.links.get(&(id, entry))? {
            Link::Page(child) => Some(*child),
            Link::Leaf(_) => None,
        }
    }

    /// The entries that point to a page.
    pub(in crate::shadow) fn parents(&self, id: PageId) -> &[(PageId, usize)] {
        &self.page(id).parents
    }

    /// The key of a page.
    pub(in crate::shadow) fn key(&self, id: PageId) -> Key {
        self.page(id).key
    }

    /// Points an empty entry to a page.
    pub(in crate::shadow) fn link(
        &mut self,
        id: PageId,
        entry: usize,
        child: PageId,
        frames: &impl FrameAllocator,
    ) {
        self.links.insert((id, entry), Link::Page(child));
        self.page_mut(child).parents.push((id, entry));
        leaf::install(self.words(id, frames).word(entry), F::table(self.page(child).frame));
    }

    /// What the leaf in an entry permits, if it maps the frame to the same host frame already.
    pub(in crate::shadow) fn leaf(
        &self,
        id: PageId,
        entry: usize,
        (gfn, pfn): (Gfn, Pfn),
        frames: &impl FrameAllocator,
    ) -> Option<Permissions> {
        let raw = match self.links.get(&(id, entry))? {
            Link::Leaf(own) if *own == gfn => leaf::load(self.words(id, frames).word(entry)),
            _ => return None,
        };
        (F::frame(raw, PageSize::Size4K) == pfn).then(|| F::permissions(raw))
    }

    /// Maps a leaf of 4 KiB in an empty entry, or writes the one that maps these frames anew.
    pub(in crate::shadow) fn map(
        &mut self,
        id: PageId,
        entry: usize,
        (gfn, pfn): (Gfn, Pfn),
        attributes: Attributes<F>,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) {
        match self.leaf(id, entry, (gfn, pfn), frames) {
            Some(was) => gone.narrowed |= !attributes.permissions.contains(was),
            None => {
                self.leaves += 1;
                self.links.insert((id, entry), Link::Leaf(gfn));
                self.reverse.entry(gfn).or_default().push((id, entry));
            }
        }
        leaf::install(self.words(id, frames).word(entry), F::leaf(pfn, PageSize::Size4K, attributes));
    }

    /// Empties an entry. A page that it was the last to point to, and that is no root, goes with all below it.
    pub(in crate::shadow) fn clear(
        &mut self,
        id: PageId,
        entry: usize,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) {
        let Some(link) = self.links.remove(&(id, entry)) else { return };
        leaf::install(self.words(id, frames).word(entry), F::ABSENT);
        match link {
            Link::Leaf(gfn) => {
                gone.leaves += 1;
                self.leaves -= 1;
                if let Some(entries) = self.reverse.get_mut(&gfn) {
                    entries.retain(|own| *own != (id, entry));
                    if entries.is_empty() {
                        self.reverse.remove(&gfn);
                    }
                }
            }
            Link::Page(child) => {
                let page = self.page_mut(child);
                page.parents.retain(|own| *own != (id, entry));
                gone.narrowed = true;
                if page.parents.is_empty() && page.roots == 0 {
                    self.zap(child, frames, gone);
                }
            }
        }
    }

    /// Takes a page out, with everything below that nothing else points to. A root is emptied and stays.
    pub(in crate::shadow) fn zap(&mut self, id: PageId, frames: &impl FrameAllocator, gone: &mut Gone) {
        for entry in 0..WORDS {
            self.clear(id, entry, frames, gone);
        }
        if self.is_root(id) {
            return;
        }
        for (parent, entry) in core::mem::take(&mut self.page_mut(id).parents) {
            self.links.remove(&(parent, entry));
            leaf::install(self.words(parent, frames).word(entry), F::ABSENT);
        }
        let Some(page) = self.slots[id.0].take() else { return };
        self.by_key.remove(&page.key);
        self.age.retain(|own| *own != id);
        self.free.push(id);
        if !page.key.direct
            && let Some(count) = self.tracked.get_mut(&page.key.gfn)
        {
            *count -= 1;
            if *count == 0 {
                self.tracked.remove(&page.key.gfn);
            }
        }
        gone.pages.push(page.frame);
    }

    pub(in crate::shadow) fn written(&mut self, gpa: Gpa, frames: &impl FrameAllocator, gone: &mut Gone) {
        if !self.is_tracked(gpa.frame()) {
            return;
        }
        let entry = (gpa.page_offset() / 8) as usize;
        for id in self.shadows_of(gpa.frame()..Gfn::new(gpa.frame().number() + 1)) {
            // Zapping one can take another along.
            if !self.lives(id) {
                continue;
            }
            self.page_mut(id).writes += 1;
            if self.page(id).writes >= FLOOD && !self.is_root(id) {
                self.zap(id, frames, gone);
            } else {
                self.clear(id, entry, frames, gone);
            }
        }
    }

    /// The entries that map frames under the tags of which `concerned` says so.
    pub(in crate::shadow) fn leaves_of(
        &self,
        frames: Range<Gfn>,
        concerned: impl Fn(Tag) -> bool,
    ) -> Vec<(PageId, usize)> {
        let entries = self.reverse.range(frames).flat_map(|(_, entries)| entries);
        entries.copied().filter(|(id, _)| concerned(self.key(*id).tag)).collect()
    }

    /// Takes the permission to write from a leaf.
    pub(in crate::shadow) fn protect(
        &mut self,
        id: PageId,
        entry: usize,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) {
        let word = self.words(id, frames).word(entry);
        let (old, new) = leaf::change(word, |raw| F::write_protected(raw));
        gone.narrowed |= old != new;
    }

    /// The word of the leaf for an address.
    fn leaf_word<'a>(
        &self,
        root: PageId,
        address: Gpa,
        frames: &'a impl FrameAllocator,
    ) -> Option<&'a AtomicU64> {
        let mut id = root;
        for level in (2..=self.key(root).level).rev() {
            id = self.child(id, index(address, level))?;
        }
        Some(self.words(id, frames).word(index(address, 1)))
    }

    pub(in crate::shadow) fn lookup(
        &self,
        root: PageId,
        address: Gpa,
        frames: &impl FrameAllocator,
    ) -> Option<Mapping<F>> {
        let raw = leaf::load(self.leaf_word(root, address, frames)?);
        F::is_present(raw).then(|| mapping(address, raw))
    }

    pub(in crate::shadow) fn access(
        &self,
        root: PageId,
        address: Gpa,
        access: Access,
        frames: &impl FrameAllocator,
    ) -> Option<Mapping<F>> {
        let word = self.leaf_word(root, address, frames)?;
        loop {
            let raw = leaf::load(word);
            let touched = F::is_present(raw).then(|| F::touch(raw, access)).flatten()?;
            if touched == raw || touch(word, raw, touched) {
                return Some(mapping(address, touched));
            }
        }
    }
}

/// What a leaf of 4 KiB says.
fn mapping<F: Format>(address: Gpa, raw: u64) -> Mapping<F> {
    Mapping {
        gpa: address.align_down(PageSize::Size4K),
        pfn: F::frame(raw, PageSize::Size4K),
        page_size: PageSize::Size4K,
        attributes: F::attributes(raw, PageSize::Size4K),
    }
}
