//! What is done to the block, and what it tells.

use std::fmt;
use std::ops::Range;

use premap_mmu::{Access, Attributes, Edges, PageSize, Permissions, Pfn, Present, TracksUse};

/// How many pages each cell is.
pub(crate) const PAGES: [u64; 3] = [1, 1, 510];
pub(crate) const BLOCK: u64 = 512;

/// A part of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    First,
    Second,
    Rest,
    Whole,
}

impl Part {
    pub(crate) fn cells(self) -> Range<usize> {
        match self {
            Self::First => 0..1,
            Self::Second => 1..2,
            Self::Rest => 2..3,
            Self::Whole => 0..3,
        }
    }

    pub(crate) fn pages(self) -> u64 {
        PAGES[self.cells()].iter().sum()
    }
}

/// What to map: the frames of one of a few aligned runs, writable or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct New {
    pub(crate) run: Pfn,
    pub(crate) permissions: Permissions,
    pub(crate) present: Present,
}

impl New {
    pub(crate) fn leaf<F: TracksUse>(self) -> u64 {
        F::leaf(self.run, PageSize::Size4K, Attributes::new(self.permissions))
    }
}

/// A change of leaves in place.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    Protect(Permissions),
    WriteProtect,
    ClearDirty,
    ClearAccessed,
}

impl Change {
    /// Whether each leaf that it changes is told.
    pub(crate) fn tells(self) -> bool {
        matches!(self, Self::ClearDirty | Self::ClearAccessed)
    }

    pub(crate) fn apply<F: TracksUse>(self, leaf: u64) -> u64 {
        match self {
            Self::Protect(permissions) => {
                let attributes = F::attributes(leaf, PageSize::Size4K);
                let frame = F::frame(leaf, PageSize::Size4K);
                F::leaf(frame, PageSize::Size4K, Attributes { permissions, ..attributes })
            }
            Self::WriteProtect => F::write_protected(leaf),
            Self::ClearDirty => F::clean(leaf),
            Self::ClearAccessed => F::old(leaf),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// Maps one large leaf.
    PlaceLarge(New),
    /// Maps leaves of 4 KiB as a range.
    Map(Part, New),
    /// Maps them each by itself under one lock; of one page as a fault does.
    Fill(Part, New),
    /// Maps pages 0 and 1 by a cursor.
    Cursor(New),
    Unmap(Part, Edges),
    Change(Part, Change, Edges),
    Split,
    Collapse,
    Query(Part),
    Walk(Part),
    Touch(Part, Access),
}

/// Why an operation stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stop {
    Frozen,
    Conflict,
    NotPermitted,
}

/// What an operation was told, in pages.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Told {
    /// In new leaves: mapped, or in the place of others.
    pub(crate) came: u64,
    /// In leaves that gave way to others.
    pub(crate) gave_way: u64,
    /// Unmapped, changed or rebuilt.
    pub(crate) changed: u64,
    pub(crate) spurious: u64,
    /// Which cells were told one by one.
    pub(crate) cells: [bool; 3],
    /// The leaf that a walk found, as one of 4 KiB on the run's first frame.
    pub(crate) leaf: Option<u64>,
    /// Why it stopped, and before which cell.
    pub(crate) stopped: Option<(usize, Stop)>,
}

impl fmt::Debug for Told {
    /// What is not nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { came, gave_way, changed, spurious, .. } = *self;
        let counts = [("came", came), ("gave way", gave_way), ("changed", changed), ("spurious", spurious)];
        counts
            .iter()
            .filter(|(_, pages)| *pages != 0)
            .try_for_each(|(name, pages)| write!(f, "{name} {pages} "))?;
        self.cells.contains(&true).then(|| write!(f, "cells {:?} ", self.cells)).transpose()?;
        self.leaf.map(|leaf| write!(f, "leaf {leaf:#x} ")).transpose()?;
        self.stopped.map(|(cell, why)| write!(f, "{why:?} at {cell}")).transpose()?;
        Ok(())
    }
}
