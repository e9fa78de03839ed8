//! What KVM caches of addresses without memory: "nothing here, emulate".
//!
//! KVM has that in entries of its tables that are not present. The formats here have no room for it, so it is beside the
//! table.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use premap_address::Gfn;

/// Pages of a root's addresses that lead to no memory.
#[derive(Debug, Default)]
pub(crate) struct MmioNotes(Mutex<HashMap<Gfn, Note>>);

/// To which page of the guest's memory an address leads where there is none, and the generation of the slots of which that
/// was true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    gfn: Gfn,
    generation: u64,
}

impl MmioNotes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Gfn, Note>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a page leads to one that has no memory behind it, as the slots of this generation say.
    pub(crate) fn note(&self, page: Gfn, gfn: Gfn, generation: u64) {
        self.lock().insert(page, Note { gfn, generation });
    }

    /// Where the page was noted to lead, while the slots are the same.
    pub(crate) fn find(&self, page: Gfn, generation: u64) -> Option<Gfn> {
        self.lock().get(&page).filter(|note| note.generation == generation).map(|note| note.gfn)
    }
}
