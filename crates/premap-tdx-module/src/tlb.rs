//! TLB tracking: knowing that no vCPU can still use a translation that was taken away.
//!
//! A TD has an epoch. Each vCPU that enters takes part in the epoch of that moment until it exits, and starts without cached
//! translations of earlier ones. BLOCK notes the epoch on the page that it blocks; TRACK starts the next epoch, once nobody
//! is left in the one before the current. A page blocked in epoch *b* is *tracked* when no vCPU that entered in *b* or
//! before is inside:
//!
//! ```text
//!   b < epoch - 1, or b = epoch - 1 and nobody is left in b
//! ```
//!
//! Two counters suffice, used in turns, since vCPUs are only ever in the current epoch and the one before. Source: Intel TDX
//! Module 1.5 base specification, TLB tracking.

use crate::locks::{Shared, Sharex};
use crate::status::{Class, Operand, Status};
use crate::sync::{AtomicU64, Ordering, order};

/// The first epoch, which MNG.INIT sets.
const FIRST: u64 = 1;

/// A TD's epoch, and how many vCPUs are in it and in the one before.
#[derive(Debug)]
pub(crate) struct Epochs {
    lock: Sharex,
    epoch: AtomicU64,
    inside: [AtomicU64; 2],
}

/// A vCPU's part in an epoch, until dropped.
#[derive(Debug)]
pub(crate) struct Participation<'a>(&'a AtomicU64);

impl Drop for Participation<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Self {
            lock: Sharex::new(),
            epoch: AtomicU64::new(FIRST),
            inside: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// Starts over, for a TD that is initialised.
    pub(crate) fn reset(&self) {
        self.epoch.store(FIRST, Ordering::Relaxed);
        self.inside.iter().for_each(|count| count.store(0, Ordering::Relaxed));
    }

    /// The current epoch.
    pub(crate) fn current(&self) -> u64 {
        // After the entry was blocked: who enters later with this epoch or the next sees it blocked.
        order();
        self.epoch.load(Ordering::SeqCst)
    }

    /// How many vCPUs are in an epoch, which is the current one or the one before.
    fn inside(&self, epoch: u64) -> &AtomicU64 {
        let [even, odd] = &self.inside;
        if epoch.is_multiple_of(2) { even } else { odd }
    }

    /// Takes part in the current epoch.
    ///
    /// # Errors
    /// OPERAND_BUSY (TD_EPOCH) while TRACK changes it.
    pub(crate) fn enter(&self) -> Result<Participation<'_>, Status> {
        let _lock: Shared<'_> = self.lock.try_shared().ok_or(Class::OPERAND_BUSY.on(Operand::TD_EPOCH))?;
        let count = self.inside(self.epoch.load(Ordering::Acquire));
        count.fetch_add(1, Ordering::SeqCst);
        order();
        Ok(Participation(count))
    }

    /// TRACK: starts the next epoch.
    ///
    /// # Errors
    /// OPERAND_BUSY (TD_EPOCH) while a vCPU enters or another call does the same; PREVIOUS_TLB_EPOCH_BUSY while a vCPU is
    /// left in the epoch before.
    pub(crate) fn track(&self) -> Result<(), Status> {
        let _lock = self.lock.try_exclusive().ok_or(Class::OPERAND_BUSY.on(Operand::TD_EPOCH))?;
        let epoch = self.epoch.load(Ordering::Acquire);
        if self.inside(epoch + 1).load(Ordering::SeqCst) != 0 {
            return Err(Class::PREVIOUS_TLB_EPOCH_BUSY.status());
        }
        self.epoch.store(epoch + 1, Ordering::SeqCst);
        Ok(())
    }

    /// Whether no vCPU can use a translation that was blocked in this epoch.
    pub(crate) fn is_tracked(&self, blocked: u64) -> bool {
        order();
        let epoch = self.epoch.load(Ordering::SeqCst);
        // A count seen as zero after its epoch has passed was zero for good: only the current epoch's grows, and TRACK
        // reuses a counter once it is zero.
        blocked + 1 < epoch || blocked + 1 == epoch && self.inside(blocked).load(Ordering::SeqCst) == 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_tracked_when_nobody_from_its_epoch_is_inside() {
        let epochs = Epochs::new();
        let blocked = epochs.current();
        assert!(!epochs.is_tracked(blocked));
        let early = epochs.enter().unwrap();
        epochs.track().unwrap();
        assert!(!epochs.is_tracked(blocked));
        assert_eq!(epochs.track(), Err(Class::PREVIOUS_TLB_EPOCH_BUSY.status()));
        let late = epochs.enter().unwrap();
        drop(early);
        assert!(epochs.is_tracked(blocked));
        epochs.track().unwrap();
        assert!(epochs.is_tracked(blocked) && !epochs.is_tracked(blocked + 1));
        drop(late);
        assert!(epochs.is_tracked(blocked + 1));
    }
}
