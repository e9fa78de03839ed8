//! Memory whose dirty pages KVM logs.
//!
//! A pre-fault makes a page writable wherever the host has it writable, and marks it dirty in the log: a migration would
//! send it again, and a snapshot of what changed become one of everything. Which slots are logged, Linux tells nobody but
//! who set them, so the VMM says so; such memory is made present on the host and not mapped in the guest.

use premap_address::GpaRange;

/// Guest ranges that are logged.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtyLogged(Vec<GpaRange>);

impl DirtyLogged {
    pub(crate) fn extend(&mut self, ranges: impl IntoIterator<Item = GpaRange>) {
        self.0.extend(ranges);
        self.0.sort_unstable_by_key(|range| range.start());
    }

    /// Takes the logged parts out of `ranges`, which are in ascending order, and calls back for each.
    pub(crate) fn take_out(&self, ranges: Vec<GpaRange>, mut logged: impl FnMut(GpaRange)) -> Vec<GpaRange> {
        if self.0.is_empty() {
            return ranges;
        }
        let mut others = Vec::new();
        for range in ranges {
            let mut rest = Some(range);
            while let Some(left) = rest {
                let Some(part) = self.0.iter().find_map(|one| one.intersection(left)) else {
                    others.push(left);
                    break;
                };
                let before = part.start().checked_offset_from(left.start()).unwrap_or(0);
                others.extend(left.split_at(before).map(|(before, _)| before));
                logged(part);
                rest = left.split_at(before + part.bytes()).map(|(_, behind)| behind);
            }
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use premap_address::{Gpa, PAGE_SIZE};

    use super::*;

    #[test]
    fn logged_parts_are_taken_out_and_the_rest_stays_in_order() {
        let range = |first: u64, pages: u64| GpaRange::new(Gpa::new(first * PAGE_SIZE), pages * PAGE_SIZE);
        let check = |logged: &[GpaRange], expected: &[GpaRange], out: &[GpaRange]| {
            let mut dirty = DirtyLogged::default();
            dirty.extend(logged.iter().copied());
            let mut taken = Vec::new();
            let left = dirty.take_out(vec![range(10, 10), range(30, 2)], |part| taken.push(part));
            assert_eq!((left.as_slice(), taken.as_slice()), (expected, out), "{logged:?}");
        };
        check(&[], &[range(10, 10), range(30, 2)], &[]);
        check(&[range(0, 10), range(20, 10)], &[range(10, 10), range(30, 2)], &[]);
        check(
            &[range(31, 5), range(12, 3)],
            &[range(10, 2), range(15, 5), range(30, 1)],
            &[range(12, 3), range(31, 1)],
        );
        check(&[range(0, 100)], &[], &[range(10, 10), range(30, 2)]);
    }
}
