//! What a VMM has taken out of its guest's memory, and when: before or after a plan was made.
//!
//! A plan speaks of the guest's memory as it was when the plan was made. So plans count the time: what is forgotten belongs to
//! the last plan made before it, and concerns that plan and all older ones, whenever they are run. Ranges of one time that
//! touch are one, and a range that is forgotten again is so from then on.
//!
//! **Bounded.** Beyond [`MOST`] ranges, those nearest to each other are taken together with what lies between them: plans made
//! earlier then leave a little more than they must, and never map what is gone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use premap_address::{Gpa, GpaRange, PAGE_SIZE};

/// How many ranges are told apart: some 3 MiB.
const MOST: usize = 1 << 16;

/// Plans made so far in this process.
static PLANS: AtomicU64 = AtomicU64::new(0);

/// A time, counted in plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The time at which another plan is made.
    pub(crate) fn of_new_plan() -> Self {
        // Relaxed: the count publishes nothing, and whoever makes a plan before it tells another thread to forget has
        // ordered the two.
        Self(PLANS.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn now() -> Self {
        Self(PLANS.load(Ordering::Relaxed))
    }
}

/// Whether the first bytes of a range are still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// So many are.
    There(u64),
    /// So many were forgotten.
    Gone(u64),
}

/// What was forgotten, each page once.
#[derive(Debug, Default)]
pub(crate) struct Forgotten {
    /// By their start.
    ranges: BTreeMap<Gpa, (GpaRange, Moment)>,
    latest: Option<Moment>,
}

impl Forgotten {
    /// Notes that the range was forgotten at a moment that is no earlier than any before.
    pub(crate) fn add(&mut self, range: GpaRange, when: Moment) {
        self.latest = self.latest.max(Some(when));
        for (old, at) in self.meeting(range).collect::<Vec<_>>() {
            self.ranges.remove(&old.start());
            // What is left of an older one on either side keeps its time.
            if let Some((head, _)) =
                range.start().checked_offset_from(old.start()).and_then(|bytes| old.split_at(bytes))
            {
                self.ranges.insert(head.start(), (head, at));
            }
            if let Some((_, tail)) =
                range.end().checked_offset_from(old.start()).and_then(|bytes| old.split_at(bytes))
            {
                self.ranges.insert(tail.start(), (tail, at));
            }
        }
        let mut whole = range;
        if let Some((_, (before, at))) = self.ranges.range(..range.start()).next_back()
            && *at == when
            && let Some(joined) = before.join(whole)
        {
            whole = joined;
        }
        if let Some((behind, at)) = self.ranges.get(&range.end()).copied()
            && at == when
            && let Some(joined) = whole.join(behind)
        {
            self.ranges.remove(&behind.start());
            whole = joined;
        }
        self.ranges.insert(whole.start(), (whole, when));
        if self.ranges.len() > MOST {
            self.thin_out();
        }
    }

    /// Whether anything that was forgotten concerns a plan of that time.
    pub(crate) fn concerns(&self, plan: Moment) -> bool {
        self.latest >= Some(plan)
    }

    /// How the range's first bytes stand for a plan of that time.
    pub(crate) fn standing(&self, range: GpaRange, plan: Moment) -> Standing {
        let mut gone = self.meeting(range).filter(|(_, at)| *at >= plan);
        match gone.find_map(|(gone, _)| gone.intersection(range)) {
            None => Standing::There(range.bytes()),
            Some(gone) => match gone.start().checked_offset_from(range.start()) {
                None | Some(0) => Standing::Gone(gone.bytes()),
                Some(bytes) => Standing::There(bytes),
            },
        }
    }

    /// Those that have a page of `range`, in ascending order.
    fn meeting(&self, range: GpaRange) -> impl Iterator<Item = (GpaRange, Moment)> + '_ {
        let first = self.ranges.range(..=range.start()).next_back();
        let first =
            first.filter(|(_, (first, _))| first.end() > range.start()).map_or(range.start(), |(at, _)| *at);
        self.ranges.range(first..range.end()).map(|(_, found)| *found)
    }

    /// Takes ranges together until there are half as many as there may be.
    fn thin_out(&mut self) {
        let mut gap = PAGE_SIZE;
        while self.ranges.len() > MOST / 2 {
            let mut wider: BTreeMap<Gpa, (GpaRange, Moment)> = BTreeMap::new();
            for (_, (range, when)) in std::mem::take(&mut self.ranges) {
                let last = wider.last_entry();
                match last {
                    Some(mut last) if near(last.get().0, range, gap) => {
                        let (before, at) = *last.get();
                        let bytes = range.end().checked_offset_from(before.start()).unwrap_or(before.bytes());
                        last.insert((GpaRange::new(before.start(), bytes), at.max(when)));
                    }
                    _ => {
                        wider.insert(range.start(), (range, when));
                    }
                }
            }
            self.ranges = wider;
            gap = gap.saturating_mul(2);
        }
    }
}

fn near(before: GpaRange, behind: GpaRange, gap: u64) -> bool {
    behind.start().checked_offset_from(before.end()).is_some_and(|between| between <= gap)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 48;

    fn range(first: u64, pages: u64) -> GpaRange {
        GpaRange::new(Gpa::new(first * PAGE_SIZE), pages * PAGE_SIZE)
    }

    proptest! {
        #[test]
        fn every_page_is_as_it_was_last_forgotten(
            steps in prop::collection::vec((0..PAGES - 8, 1..9_u64, 0..2_u64), 1..40), plan in 0..12_u64
        ) {
            let (mut forgotten, mut model, mut now) = (Forgotten::default(), [None; 48], 0);
            for (first, pages, later) in steps {
                now += later;
                forgotten.add(range(first, pages), Moment(now));
                for page in first..first + pages {
                    model[usize::try_from(page).unwrap()] = Some(Moment(now));
                }
            }
            let plan = Moment(plan);
            let gone = |page: u64| model[usize::try_from(page).unwrap()].is_some_and(|at| at >= plan);
            prop_assert_eq!(forgotten.concerns(plan), model.iter().any(|at| *at >= Some(plan)) || plan <= Moment(now));
            for first in 0..PAGES {
                let alike = (first..PAGES).take_while(|page| gone(*page) == gone(first)).count() as u64;
                // Of what is gone a part may be told at a time; what is there, as a whole.
                match forgotten.standing(range(first, PAGES - first), plan) {
                    Standing::There(bytes) => prop_assert_eq!((gone(first), bytes), (false, alike * PAGE_SIZE)),
                    Standing::Gone(bytes) => prop_assert!(gone(first) && bytes <= alike * PAGE_SIZE && bytes > 0),
                }
            }
        }
    }

    #[test]
    fn ranges_of_one_time_are_one_and_there_are_never_too_many() {
        let mut forgotten = Forgotten::default();
        (0..1000).rev().for_each(|page| forgotten.add(range(page, 1), Moment(1)));
        assert_eq!(forgotten.ranges.len(), 1);

        // Every other page, as a balloon may take them.
        let mut forgotten = Forgotten::default();
        for page in (0..140_000).step_by(2) {
            forgotten.add(range(page, 1), Moment(1));
            assert!(forgotten.ranges.len() <= MOST);
        }
        let gone = |page| forgotten.standing(range(page, 1), Moment(1)) == Standing::Gone(PAGE_SIZE);
        assert!((0..140_000).step_by(2).all(gone), "what is gone stays so");
        assert!(!gone(140_000));
        assert_eq!(forgotten.standing(range(0, 1), Moment(2)), Standing::There(PAGE_SIZE));
    }
}
