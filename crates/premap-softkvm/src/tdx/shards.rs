//! State spread over guest memory, so that vCPUs that work on different parts of it seldom meet.

use std::sync::{Mutex, MutexGuard};

use premap_address::Gfn;

use super::lock;

/// How many parts there are.
const SHARDS: usize = 16;
/// The pages that follow each other in one part: 16 MiB, what the engine maps by one call.
const STRETCH: u64 = 4096;

/// On cache lines of its own: two, since processors fetch them in pairs.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Apart<T>(Mutex<T>);

/// One of several parts for each stretch of guest memory, behind locks of their own.
#[derive(Debug, Default)]
pub(super) struct Shards<T>([Apart<T>; SHARDS]);

impl<T> Shards<T> {
    /// The part that a page belongs to.
    pub(super) fn of(&self, gfn: Gfn) -> MutexGuard<'_, T> {
        let index = usize::try_from(gfn.number() / STRETCH).unwrap_or(0) % SHARDS;
        lock(&self.0[index].0)
    }

    /// Every part.
    pub(super) fn iter(&self) -> impl Iterator<Item = MutexGuard<'_, T>> {
        self.0.iter().map(|part| lock(&part.0))
    }
}
