//! Frames from one block of memory: a bump of an index, and a list of what came back.
//!
//! Each thread takes fresh frames from a run of its own, so that the tables that it writes lie together and no other thread
//! writes between them; only frames that came back go through one lock. The block is touched when it is made, so that no
//! page fault falls into a mapping operation.
// UNSAFETY: carves frames out of a block of raw memory and keeps its free list in the free frames themselves.
#![expect(unsafe_code, reason = "carves frames out of raw memory")]

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ops::Range;
use core::ptr::NonNull;

use premap_address::{Hpa, PAGE_SIZE, Pfn};

use super::{FrameAllocator, TablePage};
use crate::spin::Spin;
use crate::stripes::Stripes;
use crate::sync::{AtomicUsize, Ordering};

/// How many frames a thread sets aside at once: 64 KiB.
const RUN: usize = 16;

/// Frames from one block of memory, made at once and given back at once.
#[derive(Debug)]
pub struct Arena {
    block: NonNull<u8>,
    layout: Layout,
    capacity: usize,
    /// The first frame that is in no run yet, or a number past the last.
    next: AtomicUsize,
    /// Fresh frames that a thread set aside.
    runs: Stripes<Spin<Range<usize>>>,
    /// How many frames lie in `returned`: lets takers pass by without the lock while there are none.
    waiting: AtomicUsize,
    /// The first frame of the list of those that came back; each holds the next one's number, or zero.
    returned: Spin<u64>,
}

// SAFETY: the block is plain memory that any thread may use; who uses which frame is settled by the atomic index and the
// locks.
unsafe impl Send for Arena {}
// SAFETY: as for `Send`.
unsafe impl Sync for Arena {}

impl Arena {
    /// Makes an arena of so many frames, or `None` if the memory is not to be had.
    ///
    /// # Panics
    /// The memory lies beyond the 52 bits that a table entry can hold.
    #[must_use]
    pub fn new(frames: usize) -> Option<Self> {
        let bytes = frames.max(1).checked_mul(1 << premap_address::PAGE_SHIFT)?;
        let layout = Layout::from_size_align(bytes, 1 << premap_address::PAGE_SHIFT).ok()?;
        // SAFETY: the layout's size is not zero.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let last = block.as_ptr().expose_provenance() as u64 + (bytes as u64 - 1);
        assert!(last < 1 << 52, "the heap lies beyond the 52 bits that a table entry can hold");
        for frame in 0..frames {
            // SAFETY: the byte is the first of a frame of the block, which nobody else has yet. Volatile, so that the
            // write that makes the page present is not left out.
            unsafe { block.add(frame << premap_address::PAGE_SHIFT).write_volatile(0) }
        }
        Some(Self {
            block,
            layout,
            capacity: frames,
            next: AtomicUsize::new(0),
            runs: Stripes::new(|| Spin::new(0..0)),
            waiting: AtomicUsize::new(0),
            returned: Spin::new(0),
        })
    }

    /// Takes every frame back at once. That nobody uses one follows from the exclusive borrow: a table on this arena borrows
    /// or owns it.
    pub fn reset(&mut self) {
        self.next = AtomicUsize::new(0);
        self.runs = Stripes::new(|| Spin::new(0..0));
        self.waiting = AtomicUsize::new(0);
        *self.returned.get_mut() = 0;
    }

    /// How many frames are in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        let set_aside: usize = self.runs.iter().map(|run| run.lock().len()).sum();
        self.next.load(Ordering::Relaxed).min(self.capacity)
            - set_aside
            - self.waiting.load(Ordering::Relaxed)
    }

    /// A frame of the thread's run, or of the next run of the block if that is used up.
    fn fresh(&self) -> Option<usize> {
        let mut run = self.runs.mine().lock();
        run.next().or_else(|| {
            if self.next.load(Ordering::Relaxed) >= self.capacity {
                return None;
            }
            let start = self.next.fetch_add(RUN, Ordering::Relaxed);
            *run = start..self.capacity.min(start.saturating_add(RUN));
            run.next()
        })
    }

    fn frame(&self, index: usize) -> Pfn {
        Hpa::new(self.block.as_ptr().addr() as u64 + index as u64 * PAGE_SIZE).frame()
    }

    /// The word in a free frame that holds the next one's number.
    fn link(&self, frame: Pfn) -> NonNull<u64> {
        self.pointer(frame).cast()
    }
}

// SAFETY: frames are disjoint parts of the block, which lives until the arena is dropped and does not move with it; the
// index gives each out once, and the list gives out only what came back. `TablePage` is 4 KiB aligned to 4 KiB.
unsafe impl FrameAllocator for Arena {
    fn allocate(&self) -> Option<Pfn> {
        if self.waiting.load(Ordering::Relaxed) != 0 {
            let mut first = self.returned.lock();
            if *first != 0 {
                let frame = Pfn::new(*first);
                // SAFETY: the frame is in the list, so it is free, its link was written when it came back, and the lock
                // keeps others from it.
                *first = unsafe { self.link(frame).read() };
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                return Some(frame);
            }
        }
        let index = self.fresh().or_else(|| self.runs.iter().find_map(|run| run.lock().next()))?;
        Some(self.frame(index))
    }

    unsafe fn free(&self, frame: Pfn) {
        let mut first = self.returned.lock();
        // SAFETY: the caller gives up the frame, which came from this block, so it is ours to write.
        unsafe { self.link(frame).write(*first) }
        *first = frame.number();
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        #[expect(clippy::cast_possible_truncation, reason = "the offset is within a block in memory")]
        let offset = frame.address().raw().wrapping_sub(self.block.as_ptr().addr() as u64) as usize;
        debug_assert!(offset < self.layout.size(), "{frame:?} is not of this arena");
        // SAFETY: frames of this arena lie in the block, so the offset is within the same allocation.
        unsafe { self.block.add(offset) }.cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the block was allocated with this layout and is given back once. Nobody uses its frames: tables that do
        // hold the arena, or borrow it.
        unsafe { dealloc(self.block.as_ptr(), self.layout) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn frames_are_given_once_and_again_only_when_they_came_back() {
        let arena = Arena::new(3).unwrap();
        let frames: [Pfn; 3] = core::array::from_fn(|_| arena.allocate().unwrap());
        assert!(frames[0] != frames[1] && frames[1] != frames[2] && frames[0] != frames[2]);
        assert_eq!((arena.allocate(), arena.in_use()), (None, 3));
        for frame in frames {
            // SAFETY: the frames came from this arena and are used by nobody.
            unsafe { arena.free(frame) };
        }
        assert_eq!(arena.in_use(), 0);
        let again: [Pfn; 3] = core::array::from_fn(|_| arena.allocate().unwrap());
        assert!(again.iter().all(|frame| frames.contains(frame)));
        assert_eq!(arena.allocate(), None);
    }
}
