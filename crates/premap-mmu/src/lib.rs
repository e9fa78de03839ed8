//! Concurrent second-stage page tables for hypervisors.
//!
//! A [`PageTable`] maps guest-physical pages to host frames in one of several hardware [formats](format). Any number of
//! threads map, unmap and walk it at the same time: mappers take one lock a leaf table, once for up to 512 entries;
//! walkers take none.
//!
//! | to | call |
//! |---|---|
//! | map a range to a run of frames | [`PageTable::map`], with [`Present`] saying what happens to what is there |
//! | handle a fault: map one leaf of any size if it is still valid under the lock | [`PageTable::place`] |
//! | map up to 512 pages of one block, each to a frame of its own, under one lock | [`PageTable::fill`] |
//! | map page by page | [`PageTable::cursor`] |
//! | map single pages in any order, such as a working set | [`PageTable::map_scattered`] |
//! | unmap | [`PageTable::unmap`], with [`Edges`] saying what happens to a large leaf covered in part |
//! | change permissions, or write-protect | [`PageTable::protect`], [`PageTable::write_protect`] |
//! | harvest use | [`PageTable::test_and_clear_dirty`], [`PageTable::test_and_clear_accessed`] |
//! | look up one address | [`PageTable::walk`] |
//! | translate like a processor, setting accessed and dirty | [`View::access`] |
//! | split large leaves, or make them of whole tables | [`PageTable::split`], [`PageTable::collapse`] |
//! | look at a range | [`PageTable::query`], [`PageTable::for_each`], [`PageTable::stretches`] |
//! | count leaves by size | [`PageTable::leaves`] |
//!
//! What takes a translation away returns a [`Flush`]: until it is [completed](Flush::complete) the entries stay frozen, and
//! mapping there stops with [`Obstacle::Frozen`], which means "try again". A software vCPU holds a [`View`] from translation to the
//! end of the access; [`Flush::complete_by_waiting`] then is its TLB shoot-down.
#![no_std]

extern crate alloc;
#[cfg(any(feature = "std", test))]
extern crate std;

mod attributes;
mod cursor;
mod epoch;
mod flush;
pub mod format;
pub mod frames;
mod mirror;
mod page;
mod protocol;
mod roots;
pub mod shadow;
mod spin;
mod stripes;
mod sync;
mod table;

pub use premap_address::{Gfn, Gpa, GpaRange, Hpa, PAGE_SIZE, PageSize, Pfn};

pub use attributes::{Access, Attributes, Leaves, Mapping, Permissions, Use};
pub use cursor::Cursor;
pub use flush::Flush;
pub use format::{Arm64Stage2, Ept, Format, Npt, SecureEpt, TracksUse};
#[cfg(not(loom))]
pub use frames::Arena;
pub use frames::{FrameAllocator, Heap};
pub use mirror::{Mirror, NoMirror};
pub use roots::{RootRef, Roots, Zapped};
pub use stripes::Stripes;
pub use table::{
    AccessFault, Changed, Edges, Levels, Mapped, Obstacle, OutOfFrames, PageTable, Present, Stopped, Stretch,
    View,
};

/// The README's example, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
