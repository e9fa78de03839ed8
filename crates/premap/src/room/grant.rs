//! Grants of memory while a run goes on.
//!
//! The room is not looked at for every chunk, which would cost too much: each look gives a share of it, on credit, to grant
//! from. What is granted goes from the room while the thread that has it works, and nobody can tell how much of it has
//! gone. So a look counts all that is in flight as not gone yet. That is too strict near the end, where what is in flight
//! has gone for the most part and would be counted twice. Whoever finds no room then waits until nothing is in flight, and
//! only then is the look's answer final.
//!
//! Nobody waits here with a grant in hand, nor inside the gate, so those who have grants always come to their end.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use premap_address_space::limits::Limit;

/// How long a look at the room holds,
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// and for which part of it: so many VMs may start side by side on the same look.
const SHARE: u64 = 8;

/// What is granted in a run.
#[derive(Debug, Default)]
pub(super) struct Grants {
    state: Mutex<State>,
    /// A grant was dropped, or the run is over.
    returned: Condvar,
}

#[derive(Debug)]
struct State {
    /// What may be granted before the room is looked at again.
    credit: u64,
    /// When the credit ends in any case.
    until: Instant,
    /// What is granted to threads that are still at work on it.
    in_flight: u64,
}

impl Default for State {
    fn default() -> Self {
        Self { credit: 0, until: Instant::now(), in_flight: 0 }
    }
}

impl Grants {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Grants a chunk of so many bytes, of which `absent` are not present yet, within what `limit` says of the room. Where
    /// there is none while others are at work, waits for them or for the run's end, and then grants nothing.
    ///
    /// # Errors
    /// The limit that is too close, with nobody else at work.
    pub(super) fn grant(
        &self,
        mut bytes: u64,
        limit: impl Fn() -> Option<Limit>,
        absent: impl FnOnce() -> u64,
        ended: impl Fn() -> bool,
    ) -> Result<Grant<'_>, Limit> {
        let mut absent = Some(absent);
        let mut state = self.lock();
        while state.credit < bytes || state.until <= Instant::now() {
            let Err(limit) = state.renew(bytes, limit()) else { break };
            if let Some(absent) = absent.take() {
                // What of it is present takes nothing.
                bytes = absent();
            } else if state.in_flight == 0 {
                return Err(limit);
            } else if ended() {
                return Ok(self.nothing());
            } else {
                // Where the room grows meanwhile nobody tells.
                let waited = self.returned.wait_timeout(state, LOOK_EVERY);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.credit -= bytes;
        state.in_flight += bytes;
        Ok(Grant { grants: self, bytes })
    }

    /// A grant for what takes nothing.
    pub(super) fn nothing(&self) -> Grant<'_> {
        Grant { grants: self, bytes: 0 }
    }

    pub(super) fn wake(&self) {
        drop(self.lock());
        self.returned.notify_all();
    }
}

impl State {
    /// Takes a share of the room on credit, which leaves others theirs, but no less than what is wanted now.
    fn renew(&mut self, wanted: u64, limit: Option<Limit>) -> Result<(), Limit> {
        let floor = limit.as_ref().map_or(0, |limit| limit.margin() / 2);
        let left = limit.as_ref().map_or(u64::MAX, |limit| limit.left);
        let room = left.saturating_sub(floor).saturating_sub(self.in_flight);
        match limit.filter(|_| room < wanted) {
            Some(limit) => Err(limit),
            None => {
                (self.credit, self.until) = ((room / SHARE).max(wanted), Instant::now() + LOOK_EVERY);
                Ok(())
            }
        }
    }
}

/// Memory that a thread may make present, and is at work on while it has this.
#[must_use]
#[derive(Debug)]
pub(crate) struct Grant<'a> {
    grants: &'a Grants,
    bytes: u64,
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let mut state = self.grants.lock();
            state.in_flight = state.in_flight.saturating_sub(self.bytes);
            drop(state);
            self.grants.returned.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    use std::sync::mpsc;
    use std::thread;

    use premap_address_space::limits::LimitKind;

    use super::*;

    const MIB: u64 = 1 << 20;
    /// Long enough on any machine; a test fails then, and does not hang.
    const LONG: Duration = Duration::from_secs(30);
    /// Half of the margin of 32 MiB is kept back.
    const FLOOR: u64 = 16 * MIB;

    fn limit(left: u64) -> Option<Limit> {
        Some(Limit { kind: LimitKind::Cgroup, path: None, bytes: 64 * MIB, left })
    }

    #[test]
    fn a_share_of_the_room_is_granted_and_at_the_end_just_what_is_wanted() {
        #[track_caller]
        fn check(in_flight: u64, wanted: u64, left: u64, credit: Option<u64>) {
            let mut state = State { in_flight, ..State::default() };
            let renewed = state.renew(wanted, limit(left));
            assert_eq!(renewed.map(|()| state.credit).map_err(|limit| limit.left), credit.ok_or(left));
        }
        check(0, MIB, 96 * MIB, Some(10 * MIB));
        check(0, 16 * MIB, 96 * MIB, Some(16 * MIB));
        check(0, 16 * MIB, 32 * MIB, Some(16 * MIB));
        check(0, 17 * MIB, 32 * MIB, None);
        // What other threads are at work on may not be gone from the room yet.
        check(16 * MIB, 16 * MIB, 47 * MIB, None);
        check(16 * MIB, 16 * MIB, 48 * MIB, Some(16 * MIB));
        assert!(State::default().renew(1 << 60, None).is_ok(), "what is not known is no limit");
    }

    #[test]
    fn with_nobody_else_at_work_a_lack_of_room_is_told_at_once() {
        let grants = Grants::default();
        let ask = |absent| grants.grant(4 * MIB, || limit(FLOOR + MIB), || absent, || false);
        assert_eq!(ask(2 * MIB).unwrap_err().kind, LimitKind::Cgroup);
        assert!(ask(MIB).is_ok() && ask(0).is_ok(), "what is present takes nothing");
    }

    #[test]
    fn memory_that_a_thread_at_work_has_taken_already_is_not_counted_twice() {
        let grants = Grants::default();
        let left = AtomicU64::new(FLOOR + 40 * MIB);
        let (looked, looks) = mpsc::channel();
        let grant = |bytes, looked: &mpsc::Sender<()>| {
            let look = || {
                looked.send(()).unwrap();
                limit(left.load(SeqCst))
            };
            grants.grant(bytes, look, || bytes, || false)
        };
        let first = grant(24 * MIB, &looked).unwrap();
        looks.recv_timeout(LONG).unwrap();
        // All of it is present, so that the other chunk fits too, but the thread has it in hand yet.
        left.fetch_sub(24 * MIB, SeqCst);
        thread::scope(|scope| {
            let second = scope.spawn(|| grant(16 * MIB, &looked).map(drop));
            // Of the whole chunk, of what is absent of it, and anew.
            (0..3).for_each(|_| looks.recv_timeout(LONG).unwrap());
            assert!(!second.is_finished(), "it waits");
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_plan_that_just_fits_is_granted_whole_to_many_threads() {
        const THREADS: u64 = 8;
        const CHUNKS: u64 = 25;
        const CHUNK: u64 = 4 * MIB;
        let grants = Grants::default();
        let left = AtomicU64::new(FLOOR + THREADS * CHUNKS * CHUNK);
        let work = || {
            for _ in 0..CHUNKS {
                let grant = grants.grant(CHUNK, || limit(left.load(SeqCst)), || CHUNK, || false).unwrap();
                left.fetch_sub(CHUNK, SeqCst);
                thread::yield_now();
                drop(grant);
            }
        };
        thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
        assert_eq!(left.into_inner(), FLOOR);
    }

    #[test]
    fn who_waits_for_others_is_told_of_the_end_of_the_run() {
        let grants = Grants::default();
        let first = grants.grant(MIB, || limit(FLOOR + MIB), || MIB, || false).unwrap();
        let over = AtomicBool::new(false);
        let (asked, asks) = mpsc::channel();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                let ended = || {
                    let _ = asked.send(());
                    over.load(SeqCst)
                };
                grants.grant(MIB, || limit(FLOOR + MIB), || MIB, ended).map(|grant| grant.bytes)
            });
            asks.recv_timeout(LONG).unwrap();
            over.store(true, SeqCst);
            grants.wake();
            assert_eq!(second.join().unwrap(), Ok(0));
        });
        drop(first);
    }
}
