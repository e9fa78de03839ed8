//! Frames for second-stage tables, a chunk at a time.
//!
//! A table of 512 entries is filled in about a microsecond; a fresh page from the C library's allocator costs several. So
//! frames are cut from chunks, the first one small for small machines and the others of 2 MiB, for which a huge page is
//! asked: one page fault for 512 tables. What comes back is used again, by any root of the VM; chunks go with the VM.
//!
//! Each thread has a pool of its own, more or less: two that cut from one fresh chunk would both make its huge page, and
//! one of them in vain. Before a pool grows it takes what came back to another.
// UNSAFETY: allocates raw memory, and promises premap-mmu that frames are valid and nobody else's.
#![expect(unsafe_code, reason = "raw memory for page tables")]

use std::alloc::{Layout, alloc, dealloc};
use std::fmt;
use std::mem;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use premap_address::{PAGE_SHIFT, PAGE_SIZE, PageSize};
use premap_mmu::frames::TablePage;
use premap_mmu::{FrameAllocator, Pfn, Stripes};
use rustix::mm::{Advice, madvise};

/// Frames of the first chunk: what 64 MiB of small pages need.
const FIRST: u64 = 36;

/// The frames of a VM. A frame's number is its address divided by 4096.
#[derive(Debug, Default)]
pub(crate) struct Frames(Stripes<Mutex<Pool>>);

#[derive(Default)]
struct Pool {
    returned: Vec<Pfn>,
    /// Frame numbers of the newest chunk that were never given.
    fresh: Range<u64>,
    chunks: Vec<Chunk>,
}

/// A block of raw memory, given back on drop.
struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a chunk owns its memory and does nothing with it but give it back, which any thread may do.
unsafe impl Send for Chunk {}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc` with this layout, and is given back once. Nobody uses the frames in it any
        // more: chunks go with the pool, and every table holds the pool.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("returned", &self.returned.len())
            .field("fresh", &(self.fresh.end - self.fresh.start))
            .field("chunks", &self.chunks.len())
            .finish()
    }
}

impl Frames {
    /// The calling thread's pool.
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.mine().lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames that came back to some pool, not the caller's, which is locked. A pool in use is passed over.
    fn returned_elsewhere(&self) -> Option<Vec<Pfn>> {
        let others = self.0.iter().filter_map(|pool| pool.try_lock().ok());
        others.map(|mut pool| mem::take(&mut pool.returned)).find(|returned| !returned.is_empty())
    }
}

impl Pool {
    /// Makes a chunk, or nothing where memory is out.
    fn grow(&mut self) -> Option<()> {
        let (frames, size) = match self.chunks.len() {
            0 => (FIRST, PageSize::Size4K),
            _ => (PageSize::Size2M.pages(), PageSize::Size2M),
        };
        let bytes = usize::try_from(frames * PAGE_SIZE).ok()?;
        let layout = Layout::from_size_align(bytes, usize::try_from(size.bytes()).ok()?).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        self.chunks.push(Chunk { start, layout });
        if size > PageSize::Size4K {
            // SAFETY: advice on memory that is ours, which changes no content. Without huge pages it does nothing.
            let _ = unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
        }
        let first = start.as_ptr().expose_provenance() as u64 >> PAGE_SHIFT;
        // What a table entry can hold.
        if first + frames > 1 << 40 {
            return None;
        }
        self.fresh = first..first + frames;
        Some(())
    }
}

// SAFETY: a frame is cut from a chunk once and given again only after it came back, so no two users share it; it lies whole
// in the chunk, aligned to 4 KiB, and stays there until the pool goes, wherever `Frames` itself is moved to. Its number is
// that of its address, whose provenance was exposed, so `pointer` gives the same valid pointer each time; numbers of 2^40
// and more are refused in `grow`.
unsafe impl FrameAllocator for Frames {
    fn allocate(&self) -> Option<Pfn> {
        let mut pool = self.pool();
        if let Some(frame) = pool.returned.pop() {
            return Some(frame);
        }
        if pool.fresh.is_empty() {
            if let Some(returned) = self.returned_elsewhere() {
                pool.returned = returned;
                return pool.returned.pop();
            }
            pool.grow()?;
        }
        pool.fresh.next().map(Pfn::new)
    }

    unsafe fn free(&self, frame: Pfn) {
        self.pool().returned.push(frame);
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        let address = usize::try_from(frame.address().raw()).unwrap_or(0);
        NonNull::new(ptr::with_exposed_provenance_mut(address)).expect("no frame has the number zero")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn frames_are_distinct_across_chunks_and_used_again() {
        let frames = Frames::default();
        let count = usize::try_from(FIRST + 2 * PageSize::Size2M.pages() + 1).unwrap();
        let given: BTreeSet<_> = (0..count).map(|_| frames.allocate().unwrap().number()).collect();
        assert_eq!(given.len(), count);
        assert!(given.iter().all(|number| frames.pointer(Pfn::new(*number)).is_aligned()));
        let one = Pfn::new(*given.iter().next().unwrap());
        // SAFETY: it was given above, is given back once, and nobody uses it.
        unsafe { frames.free(one) };
        assert_eq!(frames.allocate(), Some(one));
    }

    #[test]
    fn what_came_back_on_one_thread_is_used_by_another_before_it_asks_for_more() {
        let frames = Frames::default();
        let allocate =
            || std::thread::scope(|scope| scope.spawn(|| frames.allocate().unwrap()).join().unwrap());
        let one = allocate();
        // SAFETY: it was given above, is given back once, and nobody uses it.
        unsafe { frames.free(one) };
        assert_eq!(allocate(), one);
    }
}
