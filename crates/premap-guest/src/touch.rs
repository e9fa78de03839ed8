//! The touch program: which pages a guest touches, how, and in what order.
//!
//! The order needs no list, so a guest of a few instructions runs it: page numbers are the states of a linear
//! congruential generator modulo a power of two, and those beyond the last page are skipped. Ascending order is the same
//! generator with multiplier and increment 1.
//!
//! ```text
//!   x' = (x * multiplier + increment) & mask,   steps = mask + 1,   touch page x where x < pages
//! ```

use std::fmt;

use premap_address::{Gpa, GpaRange, PAGE_SIZE};

/// How a page is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Its first word is read.
    Read,
    /// Its first word is written: [`word_of`] its page.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// In what order a vCPU touches its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Lowest address first.
    Ascending,
    /// Scattered, the same way at every run.
    Random,
}

/// Touches every page of a range once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// The pages.
    pub range: GpaRange,
    /// How each is touched.
    pub access: Access,
    /// In what order.
    pub order: Order,
}

/// What one vCPU does of a [`Touch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The first page's address.
    pub gpa: Gpa,
    /// The first page's number in the whole range.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
    /// How each is touched.
    pub access: Access,
    /// In what order.
    pub order: Order,
}

/// The odd number that makes a page's word from its number.
pub(crate) const WORD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The word that a guest writes at the start of page `index` of the range; never 0 for a page that can exist.
#[must_use]
pub const fn word_of(index: u64) -> u64 {
    index.wrapping_add(1).wrapping_mul(WORD)
}

impl Touch {
    /// Cuts the pages into `vcpus` neighbouring slices that differ by one page at most; some are empty if there are fewer
    /// pages than vCPUs.
    pub fn slices(&self, vcpus: usize) -> impl Iterator<Item = Slice> + use<> {
        let Self { range, access, order } = *self;
        let count = vcpus as u64;
        (0..count).map(move |vcpu| {
            let edge = |vcpu: u64| range.pages() / count * vcpu + vcpu.min(range.pages() % count);
            let first = edge(vcpu);
            let gpa = range.start().wrapping_add(first * PAGE_SIZE);
            Slice { gpa, first, pages: edge(vcpu + 1) - first, access, order }
        })
    }
}

impl Slice {
    /// The numbers that the guest needs to find its pages.
    pub(crate) fn sequence(&self) -> Sequence {
        match self.order {
            Order::Ascending => Sequence { multiplier: 1, increment: 1, mask: u64::MAX, steps: self.pages },
            Order::Random => {
                // Knuth's MMIX generator. Modulo any power of two its period is full: the increment is odd and the
                // multiplier is 1 modulo 4.
                let steps = self.pages.next_power_of_two();
                let (multiplier, increment) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
                Sequence { multiplier, increment, mask: steps - 1, steps }
            }
        }
    }

    /// The pages in the order in which they are touched, numbered from the slice's first.
    pub fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let (pages, sequence) = (self.pages, self.sequence());
        let mut x = 0_u64;
        (0..sequence.steps)
            .map(move |_| {
                let page = x;
                x = x.wrapping_mul(sequence.multiplier).wrapping_add(sequence.increment) & sequence.mask;
                page
            })
            .filter(move |page| *page < pages)
    }
}

/// The generator of page numbers, starting at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) multiplier: u64,
    pub(crate) increment: u64,
    pub(crate) mask: u64,
    pub(crate) steps: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(pages: u64, order: Order) -> Touch {
        Touch { range: GpaRange::new(Gpa::new(4 << 30), pages * PAGE_SIZE), access: Access::Write, order }
    }

    /// All pages that `vcpus` slices touch, in order.
    fn touched(pages: u64, order: Order, vcpus: usize) -> Vec<u64> {
        touch(pages, order)
            .slices(vcpus)
            .flat_map(|slice| slice.pages().map(move |page| slice.first + page))
            .collect()
    }

    #[test]
    fn every_page_is_touched_exactly_once() {
        for pages in [1, 2, 3, 5, 64, 1_000, 4_097] {
            for order in [Order::Ascending, Order::Random] {
                for vcpus in [1, 2, 3, 7] {
                    let mut all = touched(pages, order, vcpus);
                    all.sort_unstable();
                    assert!(all.into_iter().eq(0..pages), "{pages} pages {order:?} on {vcpus} vCPUs");
                }
            }
        }
    }

    #[test]
    fn ascending_ascends_and_random_does_not() {
        assert!(touched(1_000, Order::Ascending, 1).is_sorted());
        let random = touched(1_000, Order::Random, 1);
        let neighbours = random.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(neighbours < 10, "{neighbours} of 1,000 pages follow their neighbour");
    }

    #[test]
    fn slices_start_where_the_last_one_ended() {
        let slices: Vec<_> = touch(10, Order::Ascending).slices(4).collect();
        assert_eq!(
            slices.iter().map(|slice| (slice.first, slice.pages)).collect::<Vec<_>>(),
            [(0, 3), (3, 3), (6, 2), (8, 2)]
        );
        assert_eq!(slices[1].gpa, Gpa::new((4 << 30) + 3 * PAGE_SIZE));
    }

    #[test]
    fn words_tell_pages_apart() {
        let mut words: Vec<_> = (0..1_000).map(word_of).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 1_000);
        assert!(!words.contains(&0), "an untouched page reads as 0");
    }
}
