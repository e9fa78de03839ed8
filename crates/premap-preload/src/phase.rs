//! When a VM's memory is mapped: the rules, without any system call.
//!
//! ```text
//!                enter             ended
//!   Fresh ──────────────> Mapping ───────> Quiet
//!                            ^               | changed, while changes are followed
//!                    enter   |               v
//!                  (the 4th) └─────────── Settling ──┐
//!                                            ^       | changed: counts anew
//!                                            └───────┘
//! ```
//!
//! (A run that was stopped to give a vCPU back begins anew at the next entry; see below.)
//!
//! **First** at the first `KVM_RUN`: slots are set, vCPUs are made, nothing has run.
//!
//! **Again** after the slots changed. Deleting a slot throws away what KVM has mapped for the whole VM, and firmware has
//! slots deleted and made anew, all of memory among them, as it unlocks and locks the area below 1 MiB. Such changes come
//! in groups, with a few exits between them, so mapping waits until four entries in a row saw no change. It also waits for
//! a vCPU that went through the kernel since: before 6.15 a pre-fault on one whose page-table root went stale by a deletion
//! does not end, and only `KVM_RUN` gives it a new root.
//!
//! **No more** once the guest has run for the time in which changes are followed (a minute, unless the user says
//! otherwise), nor after [`MOST_RUNS`]: a guest at work is not held back, and takes its faults as it would without premap.
//!
//! While a run is under way, vCPUs that want to enter the guest wait for its end. Nothing else does:
//!
//! - A change of slots stops the run, and the run counts as not done.
//! - A VMM that wants a vCPU back, to pause it say, sends its thread a signal. That stops the run too, and the vCPU's
//!   `KVM_RUN` says EINTR. The next entry goes on where the run was stopped.

use std::time::{Duration, Instant};

/// How many entries without a change mean that the slots have come to rest.
const ENTRIES_AT_REST: u32 = 4;
/// How many runs a VM gets.
const MOST_RUNS: u32 = 16;
/// For how long the runs that were stopped to give a vCPU back may hold the guest back, beyond what their work takes. QEMU
/// calls each of its vCPUs as a VM starts; a VMM with a timer calls for ever.
const MOST_HELD: Duration = Duration::from_secs(2);
/// How much a run maps in a millisecond at least, in bytes; where huge pages are not to be had it is ten times as much.
const SLOW_PER_MS: u64 = 256 << 10;

/// Where a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It has never run.
    Fresh,
    /// A run is under way.
    Mapping,
    /// A run was stopped to give a vCPU back, and goes on at the next entry.
    CalledBack,
    /// Its slots changed, and this many entries saw them at rest.
    Settling(u32),
    /// There is nothing to do.
    Quiet,
}

/// What a vCPU has in its page-table root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// None, or one that was made since the slots last changed.
    Fresh,
    /// It was not in the kernel since.
    MayBeStale,
}

/// What a vCPU that is about to enter the guest does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// It enters.
    Pass,
    /// It has the memory mapped, and enters then.
    Map,
    /// It waits for the run under way, and asks again.
    Wait,
}

/// When one VM is mapped.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    phase: Phase,
    /// Slot changes under way on other threads.
    changing: u32,
    /// Runs begun.
    runs: u32,
    /// Those of them that were stopped to give a vCPU back. They are not held against [`MOST_RUNS`].
    called_back: u32,
    /// For how long they held the guest back, beyond what their work takes.
    held: Duration,
    /// When the last run began.
    run_began: Option<Instant>,
    /// When the guest first entered.
    began: Option<Instant>,
    follow: Duration,
}

impl Timing {
    /// A VM that has not run. Changes are followed for `follow` from its first entry on.
    pub(crate) fn new(follow: Duration) -> Self {
        Self {
            phase: Phase::Fresh,
            changing: 0,
            runs: 0,
            called_back: 0,
            held: Duration::ZERO,
            run_began: None,
            began: None,
            follow,
        }
    }

    /// A VM that is only looked at.
    pub(crate) fn never() -> Self {
        // Changes are followed from the first run on, and there is none.
        Self { phase: Phase::Quiet, ..Self::new(Duration::ZERO) }
    }

    /// Whether entries must be asked about.
    pub(crate) fn is_due(&self) -> bool {
        self.phase != Phase::Quiet
    }

    /// Whether a run is under way.
    pub(crate) fn is_mapping(&self) -> bool {
        self.phase == Phase::Mapping
    }

    /// Runs begun so far.
    pub(crate) fn runs(&self) -> u32 {
        self.runs
    }

    /// A vCPU with such a root is about to enter the guest.
    pub(crate) fn enter(&mut self, root: Root, now: Instant) -> Entry {
        match self.phase {
            Phase::Quiet => return Entry::Pass,
            Phase::Mapping => return Entry::Wait,
            // Another thread is at the slots: whatever would be mapped now may go again.
            _ if self.changing > 0 => return Entry::Pass,
            Phase::Settling(entries) if entries + 1 < ENTRIES_AT_REST || root == Root::MayBeStale => {
                self.phase = Phase::Settling(entries.saturating_add(1));
                return Entry::Pass;
            }
            Phase::Settling(_) | Phase::CalledBack | Phase::Fresh => {}
        }
        self.began.get_or_insert(now);
        self.runs += 1;
        self.run_began = Some(now);
        self.phase = Phase::Mapping;
        Entry::Map
    }

    /// A slot is about to change.
    pub(crate) fn changing(&mut self) {
        self.changing += 1;
    }

    /// The change was made, or refused.
    pub(crate) fn changed(&mut self, change: Change, now: Instant) {
        self.changing = self.changing.saturating_sub(1);
        let followed = !self.followed_for(now).is_zero();
        match self.phase {
            Phase::Quiet | Phase::CalledBack | Phase::Settling(_) if change == Change::Slots => {
                self.phase = if followed { Phase::Settling(0) } else { Phase::Quiet };
            }
            _ => {}
        }
    }

    fn has_runs_left(&self) -> bool {
        self.runs - self.called_back < MOST_RUNS && self.held < MOST_HELD
    }

    /// For how much longer changes are followed.
    fn followed_for(&self, now: Instant) -> Duration {
        let since =
            self.began.filter(|_| self.has_runs_left()).map(|began| now.saturating_duration_since(began));
        since.map_or(Duration::ZERO, |since| self.follow.saturating_sub(since))
    }

    /// For how much longer there may be runs; zero where there is none to come.
    pub(crate) fn needed(&self, now: Instant) -> Duration {
        /// A VM that is due is so until it enters, whenever that is.
        const DUE: Duration = Duration::from_secs(60);
        if self.is_due() { DUE } else { self.followed_for(now) }
    }

    /// The run under way has ended.
    pub(crate) fn ended(&mut self, end: End, now: Instant) {
        if let End::CalledBack { gained } = end {
            let took = self.run_began.map(|began| now.saturating_duration_since(began)).unwrap_or_default();
            self.called_back += 1;
            self.held += took.saturating_sub(Duration::from_millis(gained / SLOW_PER_MS));
        }
        self.phase = match end {
            _ if !self.has_runs_left() => Phase::Quiet,
            End::Done => Phase::Quiet,
            // The change that stopped it says by itself whether another run is worth it.
            End::Stopped => Phase::Settling(0),
            End::CalledBack { .. } => Phase::CalledBack,
        };
    }
}

/// What became of a slot change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A slot came, went or moved.
    Slots,
    /// KVM refused it, or only flags changed: what is mapped stays so.
    Nothing,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// As far as it can get.
    Done,
    /// A change of slots stopped it.
    Stopped,
    /// It was stopped to give a vCPU back to the VMM, having mapped so many bytes that were not mapped before.
    CalledBack { gained: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOW: Duration = Duration::from_secs(60);

    /// A VM that was mapped at its first entry.
    fn mapped(now: Instant) -> Timing {
        let mut timing = Timing::new(FOLLOW);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
        timing.ended(End::Done, now);
        timing
    }

    fn change(timing: &mut Timing, now: Instant) {
        timing.changing();
        timing.changed(Change::Slots, now);
    }

    #[test]
    fn the_first_entry_maps_and_the_others_wait_for_it() {
        let now = Instant::now();
        let mut timing = Timing::new(FOLLOW);
        change(&mut timing, now);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Wait);
        timing.ended(End::Done, now);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Pass);
        assert!(!timing.is_due());
    }

    #[test]
    fn changes_are_followed_once_four_entries_saw_the_slots_at_rest() {
        let now = Instant::now();
        let mut timing = mapped(now);
        change(&mut timing, now);
        assert_eq!([timing.enter(Root::Fresh, now), timing.enter(Root::Fresh, now)], [Entry::Pass; 2]);
        change(&mut timing, now);
        assert_eq!(
            [timing.enter(Root::Fresh, now), timing.enter(Root::Fresh, now), timing.enter(Root::Fresh, now)],
            [Entry::Pass; 3]
        );
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
        timing.ended(End::Done, now);
        assert_eq!((timing.enter(Root::Fresh, now), timing.runs()), (Entry::Pass, 2));
    }

    #[test]
    fn a_vcpu_whose_root_may_be_stale_leaves_the_run_to_another() {
        let now = Instant::now();
        let mut timing = mapped(now);
        change(&mut timing, now);
        for _ in 0..2 * ENTRIES_AT_REST {
            assert_eq!(timing.enter(Root::MayBeStale, now), Entry::Pass);
        }
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
    }

    #[test]
    fn a_refused_change_and_a_late_one_change_nothing() {
        let now = Instant::now();
        let mut timing = mapped(now);
        timing.changing();
        timing.changed(Change::Nothing, now);
        assert!(!timing.is_due());
        change(&mut timing, now + FOLLOW);
        assert!(!timing.is_due());
    }

    #[test]
    fn settling_ends_with_the_time_in_which_changes_are_followed() {
        let now = Instant::now();
        let mut timing = mapped(now);
        change(&mut timing, now);
        change(&mut timing, now + FOLLOW);
        assert!(!timing.is_due());
    }

    #[test]
    fn nothing_is_begun_while_a_slot_is_changing() {
        let now = Instant::now();
        let mut timing = Timing::new(FOLLOW);
        timing.changing();
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Pass);
        timing.changed(Change::Slots, now);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
    }

    #[test]
    fn a_stopped_run_is_made_up_for_and_runs_are_bounded() {
        let now = Instant::now();
        let mut timing = Timing::new(FOLLOW);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
        for _ in 1..MOST_RUNS {
            timing.changing();
            timing.ended(End::Stopped, now);
            timing.changed(Change::Slots, now);
            let entries: Vec<_> = (0..ENTRIES_AT_REST).map(|_| timing.enter(Root::Fresh, now)).collect();
            assert_eq!(entries.last(), Some(&Entry::Map));
        }
        timing.ended(End::Stopped, now);
        assert!(!timing.is_due());
    }

    #[test]
    fn a_vm_that_is_only_looked_at_never_waits() {
        let mut timing = Timing::never();
        change(&mut timing, Instant::now());
        assert_eq!((timing.is_due(), timing.runs()), (false, 0));
    }

    #[test]
    fn a_run_that_gave_a_vcpu_back_goes_on_at_the_next_entry() {
        let now = Instant::now();
        let mut timing = Timing::new(FOLLOW);
        assert_eq!(timing.enter(Root::Fresh, now), Entry::Map);
        timing.ended(End::CalledBack { gained: 0 }, now);
        change(&mut timing, now);
        assert_eq!(timing.enter(Root::MayBeStale, now), Entry::Pass, "roots may be stale after a change");
    }

    #[test]
    fn a_vmm_that_calls_all_the_while_has_its_guest_run_once_nothing_gets_on() {
        let tick = Duration::from_millis(10);
        // Runs that a timer stops, until an entry passes.
        let runs = |gained, most: u32| {
            let (mut timing, mut now) = (Timing::new(FOLLOW), Instant::now());
            while timing.runs() < most && timing.enter(Root::Fresh, now) == Entry::Map {
                now += tick;
                timing.ended(End::CalledBack { gained }, now);
            }
            timing.runs()
        };
        assert_eq!(runs(0, 10_000), 200, "two seconds of them");
        assert_eq!(runs(SLOW_PER_MS * 10, 10_000), 10_000, "what gets on goes on");
    }

    #[test]
    fn a_vm_needs_a_thread_until_its_changes_are_not_followed_any_more() {
        let now = Instant::now();
        let mut timing = Timing::new(FOLLOW);
        assert!(!timing.needed(now).is_zero());
        timing.enter(Root::Fresh, now);
        assert!(!timing.needed(now + FOLLOW).is_zero(), "a run is under way");
        timing.ended(End::Done, now);
        assert_eq!((timing.needed(now), timing.needed(now + FOLLOW)), (FOLLOW, Duration::ZERO));
        assert_eq!(Timing::never().needed(now), Duration::ZERO);
    }
}
