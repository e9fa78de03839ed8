//! Counting calls.

use premap_mmu::Stripes;

use super::{Outcome, Seamcall};
use crate::Module;
use crate::sync::{Field, Ordering};

/// How often a call was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// All of its calls.
    pub calls: u64,
    /// Those whose status was not success.
    pub refused: u64,
}

/// How often each call was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts([Count; Seamcall::ALL.len()]);

impl Counts {
    /// How often this one was made.
    #[must_use]
    pub fn of(&self, call: Seamcall) -> Count {
        self.0[call as usize]
    }

    /// Every call that was made, with its counts.
    pub fn iter(&self) -> impl Iterator<Item = (Seamcall, Count)> + '_ {
        Seamcall::ALL.into_iter().map(|call| (call, self.of(call))).filter(|(_, count)| count.calls > 0)
    }

    /// What was made since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|call| Count {
            calls: self.0[call].calls.wrapping_sub(earlier.0[call].calls),
            refused: self.0[call].refused.wrapping_sub(earlier.0[call].refused),
        }))
    }
}

#[derive(Debug, Default)]
struct Cell {
    calls: Field,
    refused: Field,
}

/// The counters, each thread's apart.
#[derive(Debug)]
pub(crate) struct Counters(Box<Stripes<[Cell; Seamcall::ALL.len()]>>);

impl Counters {
    pub(crate) fn new() -> Self {
        Self(Box::new(Stripes::new(|| std::array::from_fn(|_| Cell::default()))))
    }
}

impl Module {
    /// Makes a call: counts it, and refuses it untried if a test wants that.
    #[inline]
    pub(crate) fn perform<T>(&self, call: Seamcall, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let cell = &self.counters.0.mine()[call as usize];
        cell.calls.fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "inject")]
        let outcome = match self.injected(call) {
            Some(status) => Err(status.into()),
            None => work(),
        };
        #[cfg(not(feature = "inject"))]
        let outcome = work();
        if outcome.is_err() {
            cell.refused.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// How often each call was made so far, on all threads. Calls under way may be counted or not.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = [Count::default(); Seamcall::ALL.len()];
        for stripe in self.counters.0.iter() {
            for (count, cell) in counts.iter_mut().zip(stripe) {
                count.calls += cell.calls.load(Ordering::Relaxed);
                count.refused += cell.refused.load(Ordering::Relaxed);
            }
        }
        Counts(counts)
    }
}
