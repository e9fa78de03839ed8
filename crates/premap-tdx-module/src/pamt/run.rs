//! The entries of one page of any size, all claimed or none.

use premap_address::Pfn;

use super::entry::{Claim, Unclaimable};
use super::{PageRecord, Pamt};
use crate::operand::Level;

/// The claimed entries of one page, given back as they are when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Run<'a> {
    first: Claim<'a>,
    rest: Vec<Claim<'a>>,
}

impl Pamt {
    /// Takes the entries of the page of this size that starts at `first`, if each is `fit`.
    ///
    /// # Errors
    /// One is not, or lies outside of TDMRs, or another call has it.
    #[inline]
    pub(crate) fn claim_run(
        &self,
        first: Pfn,
        level: Level,
        fit: impl Fn(PageRecord) -> bool,
    ) -> Result<Run<'_>, Unclaimable> {
        let head = self.entry(first).ok_or(Unclaimable::Incorrect)?.claim(&fit)?;
        self.claim_rest(head, first, level, fit)
    }

    /// Takes the entries of the rest of a page whose first is taken.
    ///
    /// # Errors
    /// As for [`claim_run`](Self::claim_run); the first is given back too.
    #[inline]
    pub(crate) fn claim_rest<'a>(
        &'a self,
        head: Claim<'a>,
        first: Pfn,
        level: Level,
        fit: impl Fn(PageRecord) -> bool,
    ) -> Result<Run<'a>, Unclaimable> {
        let claim = |page| {
            let entry = first.checked_add(page).and_then(|frame| self.entry(frame));
            entry.ok_or(Unclaimable::Incorrect)?.claim(&fit)
        };
        let rest = (1..level.pages()).map(claim).collect::<Result<_, _>>()?;
        Ok(Run { first: head, rest })
    }
}

impl Run<'_> {
    /// The epoch in which the page was blocked.
    pub(crate) fn blocked(&self) -> u64 {
        self.first.entry().blocked()
    }

    /// Makes the page a TD's.
    #[inline]
    pub(crate) fn assign(self, record: PageRecord) {
        self.each(|claim| claim.assign(record));
    }

    /// Says of which size the 4 KiB pages are part now.
    pub(crate) fn resize(self, level: Level) {
        self.each(|claim| claim.resize(level));
    }

    /// Gives the page back to the host.
    pub(crate) fn release(self) {
        self.each(|claim| claim.release());
    }

    /// The head's entry last: who finds it free finds the others free.
    #[inline]
    fn each(self, mut change: impl FnMut(Claim<'_>)) {
        self.rest.into_iter().for_each(&mut change);
        change(self.first);
    }
}
