//! One page's entry.

use premap_address::Pfn;

use crate::operand::Level;
use crate::sync::{AtomicU64, Backoff, Ordering};

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageType {
    /// Not directly assigned: free, as far as the module is concerned.
    Nda = 0,
    /// Reserved: in a TDMR's reserved area.
    Reserved = 1,
    /// A TD's private memory.
    Regular = 3,
    /// A TD's root.
    Tdr = 4,
    /// More of a TD's or a vCPU's control structure.
    Tdcx = 5,
    /// A vCPU's root.
    Tdvpr = 6,
    /// A Secure-EPT table.
    SecureEpt = 8,
}

const TYPE: u64 = 0xff;
const LEVEL_SHIFT: u32 = 8;
const LEVEL: u64 = 0b11 << LEVEL_SHIFT;
/// A call has the entry.
const CLAIMED: u64 = 1 << 16;
/// The host reads or writes the page's bytes.
const HOST: u64 = 1 << 17;
/// The page holds bytes of the TD that had it.
const STALE: u64 = 1 << 18;
const OWNER_SHIFT: u32 = 24;

impl PageType {
    const fn of(word: u64) -> Self {
        match word & TYPE {
            1 => Self::Reserved,
            3 => Self::Regular,
            4 => Self::Tdr,
            5 => Self::Tdcx,
            6 => Self::Tdvpr,
            8 => Self::SecureEpt,
            _ => Self::Nda,
        }
    }
}

/// What the PAMT says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord {
    /// What it is.
    pub kind: PageType,
    /// The size of the page that it is part of, as a level.
    pub level: Level,
    /// The TDR of the TD that has it. A TDR, and a page that nobody has, have none.
    pub owner: Option<Pfn>,
}

impl PageRecord {
    /// A page that nobody has.
    pub(crate) const FREE: Self = Self { kind: PageType::Nda, level: Level::PT, owner: None };

    /// A TD's page.
    pub(crate) const fn of(kind: PageType, level: Level, owner: Pfn) -> Self {
        Self { kind, level, owner: Some(owner) }
    }

    fn word(self) -> u64 {
        let owner = self.owner.map_or(0, Pfn::number);
        self.kind as u64 | u64::from(self.level.raw()) << LEVEL_SHIFT | owner << OWNER_SHIFT
    }

    fn from_word(word: u64) -> Self {
        let level = [Level::PT, Level::PD, Level::PDPT, Level::PDPT][(word & LEVEL) as usize >> LEVEL_SHIFT];
        let kind = PageType::of(word);
        let owner =
            matches!(kind, PageType::Regular | PageType::Tdcx | PageType::Tdvpr | PageType::SecureEpt);
        Self { kind, level, owner: owner.then_some(Pfn::new(word >> OWNER_SHIFT)) }
    }
}

/// Why an entry can't be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unclaimable {
    /// It is not what the call needs.
    Incorrect,
    /// Another call has it.
    Busy,
}

/// A page's entry.
#[derive(Debug)]
pub(crate) struct Entry {
    word: AtomicU64,
    /// BEPOCH: the TD's epoch when the page, or the table that it is, was blocked.
    blocked: AtomicU64,
}

impl Default for Entry {
    fn default() -> Self {
        Self { word: AtomicU64::new(0), blocked: AtomicU64::new(0) }
    }
}

impl Entry {
    /// What the page is now.
    #[inline]
    pub(crate) fn record(&self) -> PageRecord {
        PageRecord::from_word(self.word.load(Ordering::Acquire))
    }

    /// Makes the page a reserved one. Nobody uses the PAMT yet.
    pub(super) fn reserve(&self) {
        self.word.store(PageType::Reserved as u64, Ordering::Relaxed);
    }

    /// The epoch in which the page was blocked.
    pub(crate) fn blocked(&self) -> u64 {
        self.blocked.load(Ordering::Acquire)
    }

    /// Notes the epoch in which the page was blocked, under the lock of the Secure-EPT entry that maps it.
    pub(crate) fn set_blocked(&self, epoch: u64) {
        self.blocked.store(epoch, Ordering::Release);
    }

    /// Takes the entry, if the page is `fit`.
    ///
    /// # Errors
    /// It is not, or another call has it.
    #[inline]
    pub(crate) fn claim(&self, fit: impl Fn(PageRecord) -> bool) -> Result<Claim<'_>, Unclaimable> {
        let mut backoff = Backoff::new();
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if !fit(PageRecord::from_word(word)) {
                return Err(Unclaimable::Incorrect);
            }
            if word & CLAIMED != 0 {
                return Err(Unclaimable::Busy);
            }
            if word & HOST != 0 {
                backoff.wait();
                word = self.word.load(Ordering::Relaxed);
                continue;
            }
            match self.word.compare_exchange(word, word | CLAIMED, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(Claim { entry: self, word }),
                Err(now) => word = now,
            }
        }
    }

    /// Keeps the page as it is while the host reads or writes its bytes; `None` if a call has the entry.
    pub(crate) fn hold_for_host(&self) -> Option<HeldForHost<'_>> {
        let mut backoff = Backoff::new();
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if word & CLAIMED != 0 {
                return None;
            }
            if word & HOST != 0 {
                backoff.wait();
                word = self.word.load(Ordering::Relaxed);
                continue;
            }
            match self.word.compare_exchange(word, word | HOST, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(HeldForHost { entry: self, word }),
                Err(now) => word = now,
            }
        }
    }
}

/// An entry that one call has, given back as it is when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Claim<'a> {
    entry: &'a Entry,
    word: u64,
}

impl Claim<'_> {
    pub(crate) fn record(&self) -> PageRecord {
        PageRecord::from_word(self.word)
    }

    pub(crate) fn entry(&self) -> &Entry {
        self.entry
    }

    /// Makes the page a TD's. Whatever it holds is no host's from now on.
    #[inline]
    pub(crate) fn assign(mut self, record: PageRecord) {
        self.entry.blocked.store(0, Ordering::Relaxed);
        self.word = record.word();
    }

    /// Says of which size the page is part now; the epoch in which it was blocked stays.
    pub(crate) fn resize(mut self, level: Level) {
        self.word = self.word & !LEVEL | u64::from(level.raw()) << LEVEL_SHIFT;
    }

    /// Gives the page back to the host, with what the TD left in it.
    pub(crate) fn release(mut self) {
        self.word = PageRecord::FREE.word() | STALE;
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.entry.word.store(self.word, Ordering::Release);
    }
}

/// An entry that stays as it is while the host uses the page's bytes.
#[derive(Debug)]
pub(crate) struct HeldForHost<'a> {
    entry: &'a Entry,
    word: u64,
}

impl HeldForHost<'_> {
    pub(crate) fn kind(&self) -> PageType {
        PageType::of(self.word)
    }

    /// Whether the page still holds bytes of a TD that had it.
    pub(crate) fn is_stale(&self) -> bool {
        self.word & STALE != 0
    }

    /// Says that the host has overwritten all of the page.
    pub(crate) fn refreshed(&mut self) {
        self.word &= !STALE;
    }
}

impl Drop for HeldForHost<'_> {
    fn drop(&mut self) {
        self.entry.word.store(self.word, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn records_and_words_convert_both_ways() {
        for record in [
            PageRecord::FREE,
            PageRecord { kind: PageType::Tdr, level: Level::PT, owner: None },
            PageRecord::of(PageType::Regular, Level::PD, Pfn::new((1 << 40) - 1)),
            PageRecord::of(PageType::SecureEpt, Level::PT, Pfn::new(3)),
        ] {
            assert_eq!(PageRecord::from_word(record.word()), record);
        }
    }

    #[test]
    fn a_claim_keeps_others_out_and_a_page_given_back_is_stale() {
        let entry = Entry::default();
        let free = |record: PageRecord| record.kind == PageType::Nda;
        let claim = entry.claim(free).unwrap();
        assert_eq!(entry.claim(free).unwrap_err(), Unclaimable::Busy);
        assert!(entry.hold_for_host().is_none());
        claim.assign(PageRecord::of(PageType::Regular, Level::PT, Pfn::new(7)));
        assert_eq!(entry.claim(free).unwrap_err(), Unclaimable::Incorrect);
        assert_eq!(entry.record().owner, Some(Pfn::new(7)));
        entry.claim(|_| true).unwrap().release();
        assert_eq!(entry.record(), PageRecord::FREE);
        let mut held = entry.hold_for_host().unwrap();
        assert!(held.is_stale());
        held.refreshed();
        drop(held);
        assert!(!entry.hold_for_host().unwrap().is_stale());
    }
}
