//! What became of every byte: sums that add up.

use premap::{Report, StageReport};
use serde::Serialize;

use crate::memory::{Left, Slot};

/// The guest's memory at a run: `slots = left + known + asked`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// All slots, without those of system management mode.
    slots: u64,
    /// Left alone, for the reasons that the event lists.
    left: u64,
    /// Dealt with by an earlier run, with nothing to be done again.
    known: u64,
    /// The run's plan.
    asked: u64,
}

impl Memory {
    /// Adds up.
    pub(crate) fn of(slots: &[Slot], left: &[Left], asked: u64) -> Self {
        let slots = slots.iter().filter(|slot| slot.slot >> 16 == 0).map(|slot| slot.bytes).sum();
        let left = left.iter().map(|left| left.bytes).sum();
        Self { slots, left, known: slots.saturating_sub(left).saturating_sub(asked), asked }
    }
}

/// What a VM's runs did in all. At each stage the four sums add up to what was asked; what one run abandoned and another
/// took up again was asked twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Account {
    asked: u64,
    host: Sums,
    second: Sums,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Sums {
    mapped: u64,
    skipped: u64,
    failed: u64,
    abandoned: u64,
}

impl Account {
    /// With another run.
    pub(crate) fn plus(self, report: &Report) -> Self {
        Self {
            asked: self.asked + report.asked,
            host: self.host.plus(&report.host),
            second: self.second.plus(&report.second),
        }
    }
}

impl Sums {
    fn plus(self, stage: &StageReport) -> Self {
        Self {
            mapped: self.mapped + stage.mapped,
            skipped: self.skipped + stage.skipped,
            failed: self.failed + stage.failed,
            abandoned: self.abandoned + stage.abandoned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Why;

    #[test]
    fn memory_adds_up_without_management_mode_s_slots() {
        let slot = |slot, bytes| Slot { slot, flags: 0, gpa: 0, bytes, host: 0 };
        let left = [Left { gpa: 0, bytes: 3, why: Why::Device }];
        let memory = Memory::of(&[slot(0, 10), slot(1, 20), slot(1 << 16, 5)], &left, 7);
        assert_eq!(memory, Memory { slots: 30, left: 3, known: 20, asked: 7 });
    }

    #[test]
    fn runs_add_up() {
        let mut report = Report { asked: 10, ..Report::default() };
        (report.host.mapped, report.host.failed, report.second.abandoned) = (8, 2, 10);
        let account = Account::default().plus(&report).plus(&report);
        assert_eq!((account.asked, account.host.mapped, account.host.failed), (20, 16, 4));
        assert_eq!(account.second.abandoned, 20);
    }
}
