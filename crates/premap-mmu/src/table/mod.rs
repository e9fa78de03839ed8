//! The page table itself.

mod fill;
mod large;
mod leaf_table;
mod map;
mod new_table;
mod position;
mod protect;
mod query;
mod removed;
mod resize;
mod unmap;
mod walk;

use alloc::vec::Vec;
use core::fmt;

use premap_address::{Gpa, PageSize, Pfn};

pub(crate) use leaf_table::{Found, LeafTable};
pub use map::{Mapped, Present};
pub(crate) use new_table::{NewTable, Spare};
pub(crate) use position::Position;
pub use query::Stretch;
pub use unmap::{Changed, Edges};
pub use walk::{AccessFault, View};

use crate::attributes::Leaves;
use crate::epoch::Epochs;
use crate::format::Format;
use crate::frames::FrameAllocator;
use crate::mirror::{Mirror, NoMirror};
use crate::protocol::Removed;
use crate::spin::Spin;
use crate::stripes::Stripes;
use crate::sync::{AtomicU64, Ordering};

/// How many levels a table has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Levels {
    /// 48 bits of guest-physical address.
    Four,
    /// 57 bits of guest-physical address.
    Five,
}

impl Levels {
    /// The level of the root table.
    pub(crate) const fn top(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// The first guest-physical address that such a table can't map.
    #[must_use]
    pub const fn limit(self) -> Gpa {
        Gpa::new(1 << crate::format::shift(self.top() + 1))
    }
}

/// Why an operation stopped at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle<R> {
    /// An entry waits for an owed [`Flush`](crate::Flush). Try again when that is done.
    Frozen,
    /// The allocator has no frame left.
    OutOfFrames,
    /// A leaf of another frame is present: unmap it and flush first.
    Conflict,
    /// The table does not reach that far.
    BeyondTable,
    /// The caller's own check, made under the lock, said no.
    Withdrawn,
    /// The mirror refused.
    Refused(R),
}

impl<R: fmt::Debug> fmt::Display for Obstacle<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frozen => f.write_str("an owed flush is not done yet"),
            Self::OutOfFrames => f.write_str("out of frames for tables"),
            Self::Conflict => f.write_str("another frame is mapped there"),
            Self::BeyondTable => f.write_str("the address lies beyond the table"),
            Self::Withdrawn => f.write_str("the mapping was withdrawn before it was published"),
            Self::Refused(refusal) => write!(f, "the mirror refused: {refusal:?}"),
        }
    }
}

impl<R: fmt::Debug> core::error::Error for Obstacle<R> {}

/// Where an operation stopped, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped<R> {
    /// Everything before this address is done, nothing from it on.
    pub gpa: Gpa,
    /// Why.
    pub obstacle: Obstacle<R>,
}

/// A second-stage page table that any number of threads may map, unmap and walk at the same time.
///
/// See the protocol module's text for what that means, and [`Flush`](crate::Flush) for what follows a change.
pub struct PageTable<F: Format, A: FrameAllocator, M: Mirror = NoMirror> {
    root: Pfn,
    levels: Levels,
    /// The first address past what the levels reach.
    limit: Gpa,
    frames: A,
    mirror: M,
    /// Leaves mapped less leaves unmapped, by size; only the sum over all threads means anything.
    leaves: Stripes<[AtomicU64; 3]>,
    epochs: Epochs,
    /// Tables of dropped flushes: unlinked, perhaps still cached by hardware, freed with the page table.
    parked: Spin<Vec<Removed>>,
    format: core::marker::PhantomData<F>,
}

/// A table with no frames to be had for its root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrames;

impl fmt::Display for OutOfFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of frames for tables")
    }
}

impl core::error::Error for OutOfFrames {}

impl<F: Format, A: FrameAllocator> PageTable<F, A> {
    /// Makes an empty table.
    ///
    /// # Errors
    /// The allocator has no frame for the root.
    pub fn new(frames: A, levels: Levels) -> Result<Self, OutOfFrames> {
        Self::with_mirror(frames, levels, NoMirror)
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> PageTable<F, A, M> {
    /// Makes an empty table that tells an external one of each change.
    ///
    /// # Errors
    /// The allocator has no frame for the root.
    pub fn with_mirror(frames: A, levels: Levels, mirror: M) -> Result<Self, OutOfFrames> {
        let root = NewTable::empty::<F>(&frames).ok_or(OutOfFrames)?.into_frame();
        Ok(Self {
            root,
            levels,
            limit: levels.limit(),
            frames,
            mirror,
            leaves: Stripes::new(|| core::array::from_fn(|_| AtomicU64::new(0))),
            epochs: Epochs::new(),
            parked: Spin::new(Vec::new()),
            format: core::marker::PhantomData,
        })
    }

    /// The frame of the root table: what EPTP, nCR3 or VTTBR point to.
    #[must_use]
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// How many levels the table has.
    #[must_use]
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// The mirror.
    #[must_use]
    pub fn mirror(&self) -> &M {
        &self.mirror
    }

    /// The allocator.
    #[must_use]
    pub fn frames(&self) -> &A {
        &self.frames
    }

    /// How many leaves are mapped, by size. Exact when no operation is under way and no cursor open.
    #[must_use]
    pub fn leaves(&self) -> Leaves {
        let sum = |size: usize| {
            let counts = self.leaves.iter().map(|counts| counts[size].load(Ordering::Relaxed));
            // Another thread may have counted what it unmapped before one here counted that it had mapped it.
            counts.fold(0, u64::wrapping_add).cast_signed().max(0).cast_unsigned()
        };
        let [size_4k, size_2m, size_1g] = [0, 1, 2].map(sum);
        Leaves { size_4k, size_2m, size_1g }
    }

    /// Adds what was mapped to the count and takes off what was unmapped.
    pub(crate) fn account(&self, mapped: Leaves, unmapped: Leaves) {
        for (counter, size) in self.leaves.mine().iter().zip(PageSize::ALL) {
            let change = mapped.get(size).wrapping_sub(unmapped.get(size));
            if change != 0 {
                counter.fetch_add(change, Ordering::Relaxed);
            }
        }
    }

    /// Waits until every [`View`] and cursor that lives now has gone. The caller holds none itself.
    pub fn synchronize(&self) {
        self.epochs.synchronize();
    }
}

impl<F: Format, A: FrameAllocator, M: Mirror> fmt::Debug for PageTable<F, A, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("format", &F::NAME)
            .field("levels", &self.levels)
            .field("leaves", &self.leaves())
            .finish_non_exhaustive()
    }
}
