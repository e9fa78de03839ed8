//! Frames from the global allocator.
// UNSAFETY: calls the global allocator and turns frame numbers back into the pointers they came from.
#![expect(unsafe_code, reason = "raw allocation of table pages")]

use core::alloc::Layout;
use core::ptr::{self, NonNull};

use premap_address::{Hpa, Pfn};

use super::{FrameAllocator, TablePage};

/// Frames from the global allocator; a frame's number is its address divided by 4096.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap;

const LAYOUT: Layout = Layout::new::<TablePage>();

// SAFETY: the global allocator gives memory of the layout asked for, which is that of a `TablePage` and aligned to 4 KiB,
// so the number loses no bit of the address; exposing the provenance lets `pointer` restore it. User-space and kernel
// heap addresses that fit the formats' 52 bits are asserted at allocation.
unsafe impl FrameAllocator for Heap {
    fn allocate(&self) -> Option<Pfn> {
        // SAFETY: the layout's size is not zero.
        let page = NonNull::new(unsafe { alloc::alloc::alloc(LAYOUT) })?;
        let address = page.as_ptr().expose_provenance() as u64;
        assert!(address < 1 << 52, "the heap lies beyond the 52 bits that a table entry can hold");
        Some(Hpa::new(address).frame())
    }

    unsafe fn free(&self, frame: Pfn) {
        // SAFETY: the caller promises that the frame came from `allocate`, hence from the global allocator with this
        // layout, and that nobody uses it.
        unsafe { alloc::alloc::dealloc(self.pointer(frame).as_ptr().cast(), LAYOUT) }
    }

    fn pointer(&self, frame: Pfn) -> NonNull<TablePage> {
        #[expect(clippy::cast_possible_truncation, reason = "the number was made from a pointer")]
        let address = frame.address().raw() as usize;
        NonNull::new(ptr::with_exposed_provenance_mut(address)).expect("no frame has the number zero")
    }
}
