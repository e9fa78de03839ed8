//! Where the frames of tables come from.
//!
//! An allocator gives 4 KiB frames by number and says at which pointer the crate finds a frame's words. A kernel has a
//! direct map for that; in user space the "frame number" of a table can simply be its address, which is what [`Heap`]
//! and [`Arena`] do. What the number means to hardware is the caller's affair.
// UNSAFETY: the trait is the border to the caller's memory; who implements it promises what no compiler can check.
#![expect(unsafe_code, reason = "the border to the caller's memory")]

#[cfg(not(loom))]
mod arena;
mod heap;

use core::ptr::NonNull;

use premap_address::Pfn;

#[cfg(not(loom))]
pub use arena::Arena;
pub use heap::Heap;

pub use crate::page::TablePage;

/// A source of frames for tables.
///
/// # Safety
/// For every frame that `allocate` gave and `free` did not take back, `pointer` gives the same pointer every time, valid
/// for reads and writes of a [`TablePage`] from any thread, and overlapping no other memory in use. Frame numbers are
/// below 2^40. All of that holds for as long as the allocator lives, even if it is moved.
pub unsafe trait FrameAllocator: Send + Sync {
    /// A frame with any content, or `None` if there is none left.
    fn allocate(&self) -> Option<Pfn>;

    /// Takes a frame back.
    ///
    /// # Safety
    /// The frame came from `allocate` of this allocator, is given back once, and is used by nobody any more.
    unsafe fn free(&self, frame: Pfn);

    /// Where the frame's words are.
    fn pointer(&self, frame: Pfn) -> NonNull<TablePage>;
}

// SAFETY: every call goes to the allocator behind the reference, which keeps the promise; it outlives the reference.
unsafe impl<A: FrameAllocator + ?Sized> FrameAllocator for &A {
    fn allocate(&self) -> Option<Pfn> {
        (**self).allocate()
    }

    unsafe fn free(&self, frame: Pfn) {
        // SAFETY: the caller's promise is the one that the allocator behind the reference asks for.
        unsafe { (**self).free(frame) }
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        (**self).pointer(frame)
    }
}

// SAFETY: as for the reference: the `Arc` keeps the allocator alive and in place.
unsafe impl<A: FrameAllocator + ?Sized> FrameAllocator for alloc::sync::Arc<A> {
    fn allocate(&self) -> Option<Pfn> {
        (**self).allocate()
    }

    unsafe fn free(&self, frame: Pfn) {
        // SAFETY: the caller's promise is the one that the allocator behind the pointer asks for.
        unsafe { (**self).free(frame) }
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        (**self).pointer(frame)
    }
}
