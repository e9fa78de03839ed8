//! Frames as the processors of a kernel have them: each thread has a pool of its own, which it zeroed a moment ago.
//!
//! Where frames come from, and in whose cache they lie, decides more about two threads than the page table does: lines that
//! the other core wrote last, or that come from memory, reach a limit of the machine that plain stores reach as well.
// UNSAFETY: zeroes free frames, and promises what the arena behind it promises.
#![expect(unsafe_code, reason = "hands out and zeroes frames of an arena")]

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use premap_mmu::frames::TablePage;
use premap_mmu::{Arena, FrameAllocator, Pfn};

/// Frames of an arena, a pool for each thread.
pub(crate) struct Pools<'a> {
    arena: &'a Arena,
    pools: Vec<Pool>,
}

#[repr(align(128))]
struct Pool {
    frames: Vec<Pfn>,
    used: AtomicUsize,
}

thread_local! {
    static POOL: Cell<usize> = const { Cell::new(0) };
}

impl<'a> Pools<'a> {
    /// Divides so many frames among the threads, after what the maker of a table takes for its root.
    pub(crate) fn new(arena: &'a Arena, frames: usize, threads: usize) -> Self {
        let pool = || Pool {
            frames: (0..frames / threads).map(|_| arena.allocate().expect("the arena has room")).collect(),
            used: AtomicUsize::new(0),
        };
        Self { arena, pools: (0..threads).map(|_| pool()).collect() }
    }

    /// Gives the calling thread its pool, freshly zeroed.
    pub(crate) fn enter(&self, thread: usize) {
        POOL.set(thread);
        let pool = &self.pools[thread];
        for frame in &pool.frames[pool.used.load(Ordering::Relaxed)..] {
            // SAFETY: the frame is this pool's and not given out, so nobody else uses its 4 KiB.
            unsafe { self.arena.pointer(*frame).write_bytes(0, 1) }
        }
    }
}

// SAFETY: the frames are the arena's, which keeps the promise for as long as it is borrowed; the counter gives each out
// once.
unsafe impl FrameAllocator for Pools<'_> {
    fn allocate(&self) -> Option<Pfn> {
        let pool = &self.pools[POOL.get()];
        pool.frames.get(pool.used.fetch_add(1, Ordering::Relaxed)).copied()
    }

    unsafe fn free(&self, _: Pfn) {
        // The arena takes all back at once.
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        self.arena.pointer(frame)
    }
}
