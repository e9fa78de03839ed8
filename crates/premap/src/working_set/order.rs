//! A VM's memory in the order of a working set.

use premap_address::{GpaRange, PageSize};

use super::error::Misfit;
use super::{Identity, Touched, WorkingSet};
use crate::memory::{Region, Touch};

impl WorkingSet {
    /// Puts `memory` in order: what the working set has first, in its order and touched as it was, then the rest as it is
    /// given. Every byte is there once.
    ///
    /// # Errors
    /// A working set of another image, with a range that `memory` lacks, or one that cuts a page of its backing.
    pub fn first(&self, image: &Identity, memory: &[Region]) -> Result<Vec<Region>, Misfit> {
        if self.identity != *image {
            return Err(Misfit::OtherImage { recorded: self.identity, image: *image });
        }
        let mut ordered = Vec::new();
        for touched in &self.touched {
            place(touched, memory, &mut ordered)?;
        }
        let mut taken: Vec<_> = self.touched.iter().map(|touched| touched.range).collect();
        taken.sort_unstable();
        for region in memory {
            rest(region, &taken, &mut ordered);
        }
        Ok(ordered)
    }
}

/// Finds the memory of a range, which may go on from one region to the next.
fn place(touched: &Touched, memory: &[Region], ordered: &mut Vec<Region>) -> Result<(), Misfit> {
    let mut found = 0;
    for region in memory {
        let Some(range) = region.range.intersection(touched.range) else { continue };
        let unit = region.backing.unit();
        if !range.start().raw().is_multiple_of(unit) || !range.bytes().is_multiple_of(unit) {
            return Err(Misfit::CutsPage { range, unit });
        }
        // What is only to be read is not written, whoever did so before.
        let touch = if region.touch == Touch::Read { Touch::Read } else { touched.touch };
        ordered.push(Region { touch, ..part(region, range) });
        found += range.bytes();
    }
    if found == touched.range.bytes() { Ok(()) } else { Err(Misfit::Outside(touched.range)) }
}

/// Adds the parts of a region that no range has taken; `taken` is in ascending order.
fn rest(region: &Region, taken: &[GpaRange], ordered: &mut Vec<Region>) {
    let mut at = region.range.start();
    let mut up_to = |from, to| {
        if let Some(range) = between(from, to) {
            ordered.push(part(region, range));
        }
    };
    for range in taken.iter().filter_map(|range| region.range.intersection(*range)) {
        up_to(at, range.start());
        at = range.end();
    }
    up_to(at, region.range.end());
}

fn between(from: premap_address::Gpa, to: premap_address::Gpa) -> Option<GpaRange> {
    debug_assert!(from.is_aligned(PageSize::Size4K) && to.is_aligned(PageSize::Size4K), "{from} to {to}");
    GpaRange::try_new(from, to.checked_offset_from(from)?).ok()
}

fn part(region: &Region, range: GpaRange) -> Region {
    let offset = range.start().checked_offset_from(region.range.start()).unwrap_or_default();
    Region { range, host: region.host.wrapping_add(offset), ..*region }
}
