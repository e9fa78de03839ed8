//! The one way that chunks take: from the plan's front, through the host stage, to a vCPU.
//!
//! ```text
//!   plan --take--> host stage --put--> ready (bounded, in order) --next--> second stage
//! ```
//!
//! A vCPU worker takes what is ready first, and from the plan only when nothing is: each chunk is finished before the next
//! is begun. Threads that only do the host stage run ahead by a bounded number of chunks, so that when a run ends early what
//! one stage did is nearly what the other did.
//!
//! Chunks are cut as they are taken, so that a run that ends early leaves of each piece at most one range to account for,
//! however large the plan.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use premap_address::{Gpa, GpaRange};

use crate::control::Control;
use crate::engine::Stages;
use crate::plan::{Chunk, Piece};
use crate::report::{Reason, Stage};
use crate::tally::{Numbered, Tally};

/// What a vCPU worker is to do next.
pub(crate) enum Job {
    /// Take a chunk of the plan through the host stage.
    Host(Numbered),
    /// Take the ready parts of a chunk through the second stage.
    Second(u64, Vec<GpaRange>),
}

/// Chunks on their way from the plan to a vCPU.
pub(crate) struct Pipeline {
    state: Mutex<State>,
    /// A chunk became ready, or none will any more.
    readied: Condvar,
    /// A chunk was taken out of the ready ones.
    taken: Condvar,
    /// How many chunks may be in host workers' hands or ready.
    room: usize,
}

struct State {
    pieces: std::vec::IntoIter<Piece>,
    /// What is left of the piece that was begun.
    rest: Option<Numbered>,
    chunk_bytes: u64,
    bytes_left: u64,
    /// The byte budget cut a chunk short: nothing is begun behind it.
    exhausted: bool,
    in_hand: usize,
    /// By the region's place and where they start.
    ready: BTreeMap<(u64, Gpa), Vec<GpaRange>>,
}

impl Pipeline {
    /// Chunks of `chunk_bytes`, at most `limit` bytes of them in all.
    pub(crate) fn new(pieces: Vec<Piece>, chunk_bytes: u64, limit: Option<u64>, room: usize) -> Self {
        let state = State {
            pieces: pieces.into_iter(),
            rest: None,
            chunk_bytes,
            bytes_left: limit.unwrap_or(u64::MAX),
            exhausted: false,
            in_hand: 0,
            ready: BTreeMap::new(),
        };
        Self { state: Mutex::new(state), readied: Condvar::new(), taken: Condvar::new(), room }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chunk of the plan, once there is room for it; `None` when the plan or the run is at its end.
    pub(crate) fn take(&self, control: &Control) -> Option<Numbered> {
        let mut state = self.lock();
        loop {
            if control.ended().is_some() {
                return None;
            }
            if state.in_hand + state.ready.len() < self.room {
                let chunk = state.next();
                state.in_hand += usize::from(chunk.is_some());
                return chunk;
            }
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands on what of a taken chunk may go to the second stage.
    pub(crate) fn put(&self, place: u64, ranges: Vec<GpaRange>) {
        let mut state = self.lock();
        state.in_hand -= 1;
        if let Some(first) = ranges.first() {
            state.ready.insert((place, first.start()), ranges);
        }
        drop(state);
        self.readied.notify_all();
        self.taken.notify_all();
    }

    /// The next job of a vCPU worker: the first ready chunk, else the next of the plan. Waits while one may yet become
    /// ready, and gives `None` when the plan or the run is at its end.
    pub(crate) fn next(&self, control: &Control) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if control.ended().is_some() {
                return None;
            }
            if let Some(((place, _), ranges)) = state.ready.pop_first() {
                drop(state);
                self.taken.notify_all();
                return Some(Job::Second(place, ranges));
            }
            if let Some(numbered) = state.next() {
                state.in_hand += 1;
                return Some(Job::Host(numbered));
            }
            if state.in_hand == 0 {
                drop(state);
                // Others may wait for what will not come.
                self.readied.notify_all();
                return None;
            }
            state = self.readied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wakes every waiting worker, to look whether the run has ended.
    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.readied.notify_all();
        self.taken.notify_all();
    }

    /// Notes what no worker got to: what was ready for the second stage, and what was never begun.
    pub(crate) fn lose_rest(self, control: &Control, stages: Stages, tally: &mut Tally) {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let why = control.ended().unwrap_or(Reason::Budget);
        for ((place, _), ranges) in state.ready {
            ranges.into_iter().for_each(|range| tally.lost(place, Stage::Second, range, why));
        }
        for Numbered { place, chunk } in state.rest.into_iter().chain(state.pieces.map(Numbered::from)) {
            for stage in [Stage::Host, Stage::Second] {
                let why = if stages.include(stage) { why } else { Reason::NotAsked };
                tally.lost(place, stage, chunk.range, why);
            }
        }
    }
}

impl State {
    fn next(&mut self) -> Option<Numbered> {
        if self.exhausted {
            return None;
        }
        let Numbered { place, chunk: whole } =
            self.rest.take().or_else(|| self.pieces.next().map(Numbered::from))?;
        let (wanted, _) = whole.cut(self.chunk_bytes);
        let (begun, left) = match wanted.limit(self.bytes_left) {
            (Some(begun), cut_off) => {
                self.exhausted = cut_off.is_some();
                (Some(begun), whole.split_at(begun.range.bytes()).map(|(_, left)| left))
            }
            (None, _) => {
                self.exhausted = true;
                (None, Some(whole))
            }
        };
        self.rest = left.map(|chunk| Numbered { place, chunk });
        self.bytes_left -= begun.map_or(0, |begun| begun.range.bytes());
        begun.map(|chunk| Numbered { place, chunk })
    }
}

impl From<Piece> for Numbered {
    fn from(Piece { place, region }: Piece) -> Self {
        Self { place, chunk: Chunk::whole(region) }
    }
}
