//! What the host and the guest change under the shadow: frames that go, and entries that are written.

use core::ops::Range;

use premap_address::{Gfn, Gpa};

use super::pages::Pages;
use super::{Gone, ShadowMmu, Tag, Zap};
use crate::format::Format;
use crate::frames::FrameAllocator;

impl<F: Format, A: FrameAllocator> ShadowMmu<F, A> {
    /// Tells that the guest's entry at this address was written (8 bytes, or part of them). What was built from it goes.
    pub fn written(&self, gpa: Gpa) -> Zap<'_, A> {
        self.change(|pages, frames, gone| pages.written(gpa, frames, gone)).1
    }

    /// Takes frames of the guest from every shadow leaf under the tags of which `concerned` says so, since the host takes
    /// them away.
    pub fn unmap(&self, frames: Range<Gfn>, concerned: impl Fn(Tag) -> bool) -> Zap<'_, A> {
        self.change(|pages, allocator, gone| {
            for (id, entry) in pages.leaves_of(frames, concerned) {
                pages.clear(id, entry, allocator, gone);
            }
        })
        .1
    }

    /// Takes the permission to write from every such leaf.
    pub fn write_protect(&self, frames: Range<Gfn>, concerned: impl Fn(Tag) -> bool) -> Zap<'_, A> {
        self.change(|pages, allocator, gone| {
            for (id, entry) in pages.leaves_of(frames, concerned) {
                pages.protect(id, entry, allocator, gone);
            }
        })
        .1
    }

    /// Forgets the guest's tables in these frames, since there is no such memory any more. A root that shadows one is
    /// emptied.
    pub fn forget_tables(&self, frames: Range<Gfn>, concerned: impl Fn(Tag) -> bool) -> Zap<'_, A> {
        self.change(|pages, allocator, gone| pages.forget(frames, concerned, allocator, gone)).1
    }
}

impl<F: Format> Pages<F> {
    fn forget(
        &mut self,
        tables: Range<Gfn>,
        concerned: impl Fn(Tag) -> bool,
        frames: &impl FrameAllocator,
        gone: &mut Gone,
    ) {
        for id in self.shadows_of(tables) {
            // Zapping one can take another along.
            if self.lives(id) && concerned(self.key(id).tag) {
                self.zap(id, frames, gone);
            }
        }
    }
}
