//! How far a hole reaches: pages that KVM refuses one like the other.
//!
//! A pre-fault call says of one page only that it can't be had, and a hole of 16 GiB has four million. So the first pages of
//! a hole are asked for one by one; then steps grow with what was refused in a row, up to 2 MiB. Where a step lands on a page
//! that can be had, the hole's end is found by halves, and mapping goes on from there.
//!
//! **What is found.** Every slot that is at least as long as the step there: a sixtieth of what was refused before it, and
//! never more than 2 MiB. The last page of a range is always asked for, so that a slot which goes on behind it is found too.
//! A smaller slot deep inside a hole may be stepped over, and is then reported as the hole is: the guest's touch maps it.

/// What is refused is stepped through by this part of what was refused in a row.
const PART: u64 = 60;
/// The longest step, in pages: 2 MiB.
const LONGEST_STEP: u64 = 512;

/// How an asked page compares with those refused before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// Refused like them.
    Refused,
    /// Mapped, or refused for another reason.
    Differs,
    /// There was no answer, or the run is over.
    Unknown,
}

const fn step(refused: u64) -> u64 {
    let step = refused / PART;
    if step == 0 {
        1
    } else if step > LONGEST_STEP {
        LONGEST_STEP
    } else {
        step
    }
}

/// How many of `pages`, the first of which was refused, are taken to be: at least that one. `before` is how many were in a
/// row before it, and `ask` asks for one page by its number.
pub(crate) fn extent(pages: u64, before: u64, mut ask: impl FnMut(u64) -> Page) -> u64 {
    let mut refused = 0;
    while refused + 1 < pages {
        let step = step(before + refused + 1);
        if step == 1 {
            break;
        }
        let next = (refused + step).min(pages - 1);
        match ask(next) {
            Page::Refused => refused = next,
            Page::Unknown => break,
            Page::Differs => {
                let mut differs = next;
                while differs - refused > 1 {
                    let middle = refused.midpoint(differs);
                    match ask(middle) {
                        Page::Refused => refused = middle,
                        Page::Differs => differs = middle,
                        Page::Unknown => break,
                    }
                }
                break;
            }
        }
    }
    refused + 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Goes through a layout as the second stage does, in ranges of so many pages. Gives what was mapped, and the calls.
    fn go_through(layout: &[bool], range: usize) -> (Vec<bool>, u64) {
        let (mut mapped, mut calls, mut row) = (vec![false; layout.len()], 0, 0);
        for begin in (0..layout.len()).step_by(range) {
            let end = layout.len().min(begin + range);
            let mut at = begin;
            while at < end {
                calls += 1;
                let there = layout[at..end].iter().take_while(|there| **there).count();
                mapped[at..at + there].fill(true);
                at += there;
                if there > 0 {
                    row = 0;
                    continue;
                }
                let lost = extent((end - at) as u64, row, |page| {
                    calls += 1;
                    let page = at + usize::try_from(page).unwrap();
                    if layout[page] { Page::Differs } else { Page::Refused }
                });
                row += lost;
                at += usize::try_from(lost).unwrap();
            }
        }
        (mapped, calls)
    }

    fn layouts() -> impl Strategy<Value = Vec<bool>> {
        let length = prop_oneof![1..4_usize, 1..600_usize, 500..20_000_usize];
        prop::collection::vec((any::<bool>(), length), 1..12)
            .prop_map(|runs| runs.into_iter().flat_map(|(there, pages)| vec![there; pages]).collect())
    }

    proptest! {
        #[test]
        fn every_slot_that_is_as_long_as_the_step_there_is_mapped_to_the_page(
            layout in layouts(), range in prop_oneof![1..700_usize, Just(512), Just(4096)]
        ) {
            let (mapped, _) = go_through(&layout, range);
            prop_assert!(mapped.iter().zip(&layout).all(|(mapped, there)| *there || !mapped));
            let (mut at, mut row) = (0, 0_u64);
            for slot in layout.chunk_by(|one, other| one == other) {
                let all = at..at + slot.len();
                at += slot.len();
                if mapped[all.clone()].iter().all(|mapped| *mapped) {
                    row = 0;
                    continue;
                }
                prop_assert!(
                    !slot[0] || (slot.len() as u64) < step(row), "{} pages are lost behind {row}", slot.len()
                );
                // What is lost is lost as a whole, or what is left of it lies behind a boundary of ranges.
                row += slot.len() as u64;
            }
        }
    }

    #[test]
    fn slots_behind_small_holes_are_found_whatever_their_size() {
        for hole in 0..119 {
            let layout: Vec<bool> = (0..8192).map(|page| page % (hole + 1) == hole).collect();
            assert_eq!(go_through(&layout, 4096).0, layout, "a page behind each {hole}");
        }
    }

    #[test]
    fn a_hole_of_16_gib_takes_ten_thousand_calls_and_what_lies_behind_it_is_found() {
        for range in [512, 4096] {
            let mut layout = vec![false; 4 << 20];
            layout.extend(vec![true; 513]);
            let (mapped, calls) = go_through(&layout, range);
            assert_eq!(mapped, layout);
            assert!(calls < 20_000, "{calls} calls in ranges of {range} pages");
        }
        let (_, calls) = go_through(&vec![false; 256 << 10], 4096);
        assert!(calls <= 1000, "{calls} calls for a GiB");
    }
}
