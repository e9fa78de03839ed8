//! Which pages are private: `KVM_SET_MEMORY_ATTRIBUTES`.
//!
//! **Protocol.** Who changes attributes begins an invalidation of the pages, unmaps them, changes the attributes and ends
//! it. Who maps a page takes a snapshot of the sequence first and reads the attribute then. So no mapping of a page
//! outlives the attribute that it was made under.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use premap_address::{Gfn, PageSize};

/// Which memory a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shared,
    Private,
}

/// The attributes of all pages of a VM.
#[derive(Debug, Default)]
pub(crate) struct Attributes {
    /// Ranges of private pages by their first page, with the one after their last; they neither overlap nor touch.
    private: RwLock<BTreeMap<u64, u64>>,
}

impl Attributes {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<u64, u64>> {
        self.private.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kind of a page, and how many pages from it on have the same, at most `most`.
    pub(crate) fn run(&self, gfn: Gfn, most: u64) -> (Kind, u64) {
        let private = self.read();
        let gfn = gfn.number();
        if let Some((_, end)) = private.range(..=gfn).next_back()
            && *end > gfn
        {
            return (Kind::Private, most.min(end - gfn));
        }
        let next = private.range(gfn..).next();
        (Kind::Shared, next.map_or(most, |(start, _)| most.min(start - gfn)))
    }

    /// Whether all pages of the block of this size that holds `gfn` are of one kind, so that one mapping may span them.
    pub(crate) fn are_uniform(&self, gfn: Gfn, size: PageSize) -> bool {
        self.run(gfn.align_down(size), size.pages()).1 == size.pages()
    }

    /// Whether all of the pages are of the kind already.
    pub(crate) fn all_are(&self, pages: &Range<Gfn>, kind: Kind) -> bool {
        let count = pages.end.number() - pages.start.number();
        self.run(pages.start, count) == (kind, count)
    }

    /// Makes the pages of the kind.
    pub(crate) fn set(&self, pages: &Range<Gfn>, kind: Kind) {
        let mut private = self.private.write().unwrap_or_else(PoisonError::into_inner);
        let (mut start, mut end) = (pages.start.number(), pages.end.number());
        // Whatever touches the pages goes; what lies outside of them comes back.
        let touching: Vec<(u64, u64)> = private
            .range(..=end)
            .rev()
            .map(|(start, end)| (*start, *end))
            .take_while(|(_, other_end)| *other_end >= start)
            .collect();
        for (other_start, other_end) in touching {
            private.remove(&other_start);
            match kind {
                Kind::Private => (start, end) = (start.min(other_start), end.max(other_end)),
                Kind::Shared => {
                    if other_start < start {
                        private.insert(other_start, start);
                    }
                    if other_end > end {
                        private.insert(end, other_end);
                    }
                }
            }
        }
        if kind == Kind::Private {
            private.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages(start: u64, end: u64) -> Range<Gfn> {
        Gfn::new(start)..Gfn::new(end)
    }

    proptest! {
        #[test]
        fn ranges_agree_with_a_flag_for_each_page(
            changes in prop::collection::vec((0_u64..64, 1_u64..32, any::<bool>()), 1..40)
        ) {
            let attributes = Attributes::default();
            let mut flags = [false; 96];
            for (first, count, private) in changes {
                let kind = if private { Kind::Private } else { Kind::Shared };
                attributes.set(&pages(first, first + count), kind);
                flags[usize::try_from(first).unwrap()..][..usize::try_from(count).unwrap()].fill(private);
                prop_assert!(attributes.all_are(&pages(first, first + count), kind));
                for (page, private) in flags.iter().enumerate() {
                    let run = flags[page..].iter().take_while(|flag| *flag == private).count();
                    let (kind, found) = attributes.run(Gfn::new(page as u64), (96 - page) as u64);
                    prop_assert_eq!((kind == Kind::Private, found), (*private, run as u64));
                }
            }
            let ranges = attributes.read();
            let apart = ranges.iter().zip(ranges.iter().skip(1)).all(|((_, end), (start, _))| end < start);
            prop_assert!(apart, "{:?}", ranges);
        }
    }

    #[test]
    fn a_block_is_uniform_if_no_page_differs() {
        let attributes = Attributes::default();
        assert!(attributes.are_uniform(Gfn::new(700), PageSize::Size2M));
        attributes.set(&pages(1023, 1024), Kind::Private);
        assert!(!attributes.are_uniform(Gfn::new(700), PageSize::Size2M));
        assert!(attributes.are_uniform(Gfn::new(511), PageSize::Size2M));
        attributes.set(&pages(512, 1024), Kind::Private);
        assert!(attributes.are_uniform(Gfn::new(700), PageSize::Size2M));
    }
}
