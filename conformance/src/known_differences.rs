//! Differences between the software KVM and Linux that are known, each with its reason.
//!
//! An entry is narrow on purpose: it names the releases, what is observed otherwise and nothing else, and the operations
//! concerned. A difference that an entry fits is counted as known; every other one makes a comparison fail. The list is to
//! be short, and is best empty.

use crate::script::{Difference, Observation};

/// The differences that are known.
pub const KNOWN: &[KnownDifference] = &[];

/// A difference that is known.
#[derive(Clone, Copy, Debug)]
pub struct KnownDifference {
    /// Why it is there, and why it may stay.
    pub reason: &'static str,
    /// Which releases of Linux show it, as their numbers begin: `6.12`.
    pub releases: &'static [&'static str],
    /// What is observed otherwise. All of it, and nothing more.
    pub observed: &'static [Aspect],
    /// Whether operations and observations are those that are meant.
    pub is_meant: fn(&Difference) -> bool,
}

/// A part of an [`Observation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// What the operation came to.
    Outcome,
    /// What a pre-fault left of its range.
    Left,
    /// The word that was read.
    Word,
    /// What `kvm_run` says of a page that could not be had.
    MemoryFault,
    /// How many faults it took.
    Faults,
    /// How many pages are mapped.
    Mapped,
    /// What a dirty log gave.
    Dirty,
}

impl Aspect {
    /// In which parts two observations differ.
    #[must_use]
    pub fn differing(left: &Observation, right: &Observation) -> Vec<Self> {
        // Taken apart, so that a new part of an observation can't be forgotten here.
        let Observation { outcome, left: range, word, fault, faults, mapped, dirty } = left;
        let differ = [
            (Self::Outcome, *outcome != right.outcome),
            (Self::Left, *range != right.left),
            (Self::Word, *word != right.word),
            (Self::MemoryFault, *fault != right.fault),
            (Self::Faults, *faults != right.faults),
            (Self::Mapped, *mapped != right.mapped),
            (Self::Dirty, *dirty != right.dirty),
        ];
        differ.into_iter().filter_map(|(aspect, differs)| differs.then_some(aspect)).collect()
    }
}

/// A list of known differences, as one release is judged by it.
#[derive(Clone, Copy, Debug)]
pub struct Known<'r> {
    /// The list.
    pub list: &'static [KnownDifference],
    /// The release of Linux that is compared.
    pub release: &'r str,
}

impl Known<'_> {
    /// The reason of a difference, if it is known.
    #[must_use]
    pub fn reason(&self, difference: &Difference) -> Option<&'static str> {
        let observed = Aspect::differing(&difference.left, &difference.right);
        let fits = |known: &&KnownDifference| {
            known.releases.iter().any(|release| is_of(self.release, release))
                && known.observed == observed
                && (known.is_meant)(difference)
        };
        self.list.iter().find(fits).map(|known| known.reason)
    }
}

/// Whether a release such as `6.12.117-cloud` begins with these numbers.
fn is_of(release: &str, numbers: &str) -> bool {
    release.strip_prefix(numbers).is_some_and(|rest| !rest.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use premap_guest::{Backing, Soft, VmType};
    use premap_kvm::Errno;
    use premap_softkvm::Profile;

    use super::*;
    use crate::script::{Among, Op, Outcome, Script, Scripts, Summary, compare_all};

    const RELEASE: &str = "7.2.3-cloud";

    /// What differs between 6.12 and 7.2 for sure: a pre-fault with a root that a deleted slot made stale.
    const STALE_ROOT: KnownDifference = KnownDifference {
        reason: "6.12 spins on a stale root",
        releases: &["7.2"],
        observed: &[Aspect::Outcome],
        is_meant: |difference| {
            matches!(difference.script.ops.last(), Some(Op::PreFault { .. }))
                && difference.left.outcome == Outcome::Errno(Errno::INTR)
        },
    };

    fn compare(list: &'static [KnownDifference]) -> Summary {
        let scripts = Scripts {
            among: Among::Default,
            seed: 3,
            numbers: 0..12,
            at_a_time: NonZeroUsize::new(4).unwrap(),
        };
        let kernels = (Soft::new(Profile::V6_12), Soft::new(Profile::V7_2));
        compare_all(&kernels.0, &kernels.1, scripts, Known { list, release: RELEASE }, |_| {})
    }

    #[test]
    fn what_the_list_has_is_known_and_nothing_else_is() {
        let without = compare(&[]);
        assert!(without.known.is_empty() && !without.differences.is_empty());
        let with = compare(&[STALE_ROOT]);
        assert_eq!((with.scripts, with.operations), (without.scripts, without.operations));
        assert!(!with.known.is_empty());
        for (reason, difference) in &with.known {
            assert_eq!(*reason, STALE_ROOT.reason);
            assert_eq!(difference.left.outcome, Outcome::Errno(Errno::INTR), "{difference}");
        }
        for difference in &with.differences {
            assert_ne!(difference.left.outcome, Outcome::Errno(Errno::INTR), "{difference}");
        }
    }

    #[test]
    fn a_difference_that_is_not_quite_the_known_one_is_a_difference() {
        let observation = |outcome, faults| Observation {
            outcome,
            left: None,
            word: None,
            fault: None,
            faults,
            mapped: premap_guest::MappedPages::default(),
            dirty: Vec::new(),
        };
        let pre_fault = Op::PreFault { vcpu: 0, gpa: 0, bytes: 4096, flags: 0 };
        let difference = |op, faults| Difference {
            made_by: (0, 0),
            script: Script { vm_type: VmType::Default, backing: Backing::Anonymous, ops: vec![op] },
            at: 0,
            left: observation(Outcome::Errno(Errno::INTR), 0),
            right: observation(Outcome::Done, faults),
        };
        let known = Known { list: &[STALE_ROOT], release: RELEASE };
        assert_eq!(known.reason(&difference(pre_fault, 0)), Some(STALE_ROOT.reason));
        assert_eq!(known.reason(&difference(pre_fault, 1)), None, "faults differ too");
        assert_eq!(known.reason(&difference(Op::HostRead { page: 0 }, 0)), None, "another operation");
        for release in ["7.20", "6.12.117", ""] {
            let known = Known { list: &[STALE_ROOT], release };
            assert_eq!(known.reason(&difference(pre_fault, 0)), None, "{release}");
        }
    }
}
