//! An allocator that tracks each frame's life with a loom cell: following a table entry reads the cell, giving the frame
//! back writes it, so a walker that is not ordered before the free is found whatever the memory holds.

use std::ptr::NonNull;
use std::sync::Arc as StdArc;

use loom::cell::UnsafeCell;
use premap_mmu::{FrameAllocator, Heap, Pfn};

/// Frames that loom watches: a fixed few, each with a cell.
pub(crate) struct Watched {
    frames: Vec<(Pfn, UnsafeCell<bool>)>,
    next: loom::sync::Mutex<usize>,
}

// SAFETY: the cells are there to be raced on under loom's eyes; the frames behind them are Heap's.
unsafe impl Send for Watched {}
// SAFETY: as for `Send`.
unsafe impl Sync for Watched {}

impl Watched {
    pub(crate) fn new(frames: usize) -> StdArc<Self> {
        let frames = (0..frames).map(|_| (Heap.allocate().expect("memory"), UnsafeCell::new(false)));
        StdArc::new(Self { frames: frames.collect(), next: loom::sync::Mutex::new(0) })
    }

    fn life(&self, frame: Pfn) -> &UnsafeCell<bool> {
        &self.frames.iter().find(|(own, _)| *own == frame).expect("a frame of ours").1
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        for (frame, _) in &self.frames {
            // SAFETY: the tables are gone before their allocator.
            unsafe { Heap.free(*frame) };
        }
    }
}

// SAFETY: the frames are Heap's, each given out once.
unsafe impl FrameAllocator for Watched {
    fn allocate(&self) -> Option<Pfn> {
        let mut next = self.next.lock().expect("no panics");
        let (frame, _) = self.frames.get(*next)?;
        *next += 1;
        Some(*frame)
    }

    unsafe fn free(&self, frame: Pfn) {
        // SAFETY: loom checks that nobody else is in the cell.
        self.life(frame).with_mut(|freed| unsafe { *freed = true });
    }

    fn pointer(&self, frame: Pfn) -> NonNull<premap_mmu::frames::TablePage> {
        // SAFETY: loom checks that nobody writes the cell meanwhile.
        self.life(frame).with(|freed| assert!(!unsafe { *freed }, "a freed table is reached"));
        Heap.pointer(frame)
    }
}
