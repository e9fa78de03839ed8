//! Something for every page frame of a few ranges, made when it is first asked for.

use std::sync::OnceLock;

use premap_address::Pfn;

use crate::phymem::HpaRange;

/// A `T` for every frame of its ranges. Frames are made in aligned groups of a power of two.
#[derive(Debug)]
pub(crate) struct Sparse<T> {
    spans: Box<[Span<T>]>,
    order: u32,
}

type Group<T> = OnceLock<Box<[T]>>;

#[derive(Debug)]
struct Span<T> {
    first: u64,
    end: u64,
    groups: Box<[Group<T>]>,
}

impl<T: Default> Sparse<T> {
    /// Groups of `1 << order` frames.
    pub(crate) fn new(ranges: &[HpaRange], order: u32) -> Self {
        let span = |range: &HpaRange| {
            let first = range.start().frame().number();
            let end = first + range.pages();
            let groups = (first >> order..=(end - 1) >> order).map(|_| OnceLock::new()).collect();
            Span { first, end, groups }
        };
        let new = Self { spans: ranges.iter().map(span).collect(), order };
        // A thread of a model may use only what was made before it started.
        if cfg!(loom) {
            for range in ranges {
                let first = range.start().frame().number();
                assert!((first..first + range.pages()).all(|frame| new.get(Pfn::new(frame)).is_some()));
            }
        }
        new
    }

    /// The frame's, or `None` if it lies in no range.
    #[inline]
    pub(crate) fn get(&self, frame: Pfn) -> Option<&T> {
        let (group, within) = self.find(frame)?;
        group.get_or_init(|| (0..1_u64 << self.order).map(|_| T::default()).collect()).get(within)
    }

    /// The frame's, if it or a neighbour was asked for before: else it still is as it will be made.
    pub(crate) fn get_if_made(&self, frame: Pfn) -> Option<&T> {
        let (group, within) = self.find(frame)?;
        group.get()?.get(within)
    }

    #[inline]
    fn find(&self, frame: Pfn) -> Option<(&Group<T>, usize)> {
        let number = frame.number();
        let span = self.spans.iter().find(|span| (span.first..span.end).contains(&number))?;
        let group = span.groups.get(index((number >> self.order) - (span.first >> self.order)))?;
        Some((group, index(number & ((1 << self.order) - 1))))
    }
}

/// A number of things that are in memory.
#[expect(clippy::cast_possible_truncation, reason = "a number of things that are in memory")]
const fn index(number: u64) -> usize {
    number as usize
}

#[cfg(test)]
mod tests {
    use premap_address::Hpa;

    use super::*;

    #[test]
    fn frames_are_found_in_their_ranges_and_nowhere_else() {
        let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).unwrap();
        let sparse: Sparse<std::sync::atomic::AtomicU64> =
            Sparse::new(&[range(0x3000, 0x4000), range(0x10_0000, 0x1000)], 2);
        let found: Vec<u64> = (0..0x200).filter(|&frame| sparse.get(Pfn::new(frame)).is_some()).collect();
        assert_eq!(found, [3, 4, 5, 6, 0x100]);
        let (one, other) = (sparse.get(Pfn::new(3)).unwrap(), sparse.get(Pfn::new(4)).unwrap());
        assert!(!std::ptr::eq(one, other) && std::ptr::eq(one, sparse.get(Pfn::new(3)).unwrap()));
    }
}
