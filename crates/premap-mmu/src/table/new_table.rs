//! A table that nobody can reach yet: allocated, written, and then published or given back.
// UNSAFETY: writes frames of the caller's allocator and gives them back. Who has one of these types owns the frame alone.
#![expect(unsafe_code, reason = "writes and gives back frames that are owned")]

use core::mem::ManuallyDrop;

use premap_address::Pfn;

use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::page::TablePage;

/// A frame for a table, with any content. It is given back on drop.
pub(crate) struct Spare<'t, A: FrameAllocator> {
    frames: &'t A,
    frame: Pfn,
}

/// A table that is written and not linked. It is given back on drop.
pub(crate) struct NewTable<'t, A: FrameAllocator>(Spare<'t, A>);

impl<'t, A: FrameAllocator> Spare<'t, A> {
    #[inline]
    pub(crate) fn take(frames: &'t A) -> Option<Self> {
        frames.allocate().map(|frame| Self { frames, frame })
    }

    /// Writes a table that holds `value(index)` for `count` entries from `first`, and nothing else.
    #[inline]
    pub(crate) fn write<F: Format>(
        self,
        first: usize,
        count: usize,
        value: impl FnMut(usize) -> u64,
    ) -> NewTable<'t, A> {
        // SAFETY: the frame was allocated and is not given back while `self` is there, so the pointer is valid; it was
        // not linked, so nobody else uses it.
        unsafe { TablePage::initialise(self.frames.pointer(self.frame), F::ABSENT, first, count, value) };
        NewTable(self)
    }
}

impl<A: FrameAllocator> Drop for Spare<'_, A> {
    fn drop(&mut self) {
        // SAFETY: the frame was allocated here and not linked, and goes with its only owner.
        unsafe { self.frames.free(self.frame) }
    }
}

impl<'t, A: FrameAllocator> NewTable<'t, A> {
    /// A table of absent entries.
    #[inline]
    pub(crate) fn empty<F: Format>(frames: &'t A) -> Option<Self> {
        Some(Spare::take(frames)?.write::<F>(0, 0, |_| F::ABSENT))
    }

    #[inline]
    pub(crate) fn frame(&self) -> Pfn {
        self.0.frame
    }

    /// The frame, to be written anew.
    pub(crate) fn into_spare(self) -> Spare<'t, A> {
        self.0
    }

    /// Hands the frame over to who publishes it. Nobody gives it back now but who takes the table out again.
    #[inline]
    pub(crate) fn into_frame(self) -> Pfn {
        ManuallyDrop::new(self.0).frame
    }
}
