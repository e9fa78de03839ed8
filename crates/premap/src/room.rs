//! Keeps a run within the memory that there is to take.
//!
//! A guest touches less than it has, or later, and lives in a cgroup that is smaller than it is. A run that makes all of
//! its memory present there has the VMM killed, where it would have lived without. So a run within the host's memory is
//! cut to what fits before it begins, and ended where the room shrinks meanwhile: two VMs may start side by side.
//!
//! What is present already takes nothing more, so it is mapped whatever the room. Of the rest, a plan that does not fit is
//! mapped up to where the room ends only where the caller says that its front is what the guest needs
//! ([`HostMemory::Front`]). Any other front is memory that the guest may never touch, taken from what it does. The same holds of
//! file systems in memory ([`files`]).

mod files;
mod fit;
mod grant;

use premap_address_space::limits::{Limit, Limits, Mapping, Pages};

use crate::budget::{Budget, HostMemory};
use crate::control::Control;
use crate::engine::Stages;
use crate::mappings::Mappings;
use crate::plan::{Chunk, Piece};
use crate::report::Stage;
use crate::tally::Tally;

use fit::{Candidate, Fitted};
use grant::{Grant, Grants};

/// The room of a run, which has an end only where the caller wants it to.
#[derive(Debug, Default)]
pub(crate) struct Room {
    within: Option<(HostMemory, Limits)>,
    /// Whether the run needs any ordinary pages beyond those that are present, which are mapped whatever the room.
    is_needed: bool,
    grants: Grants,
}

impl Room {
    pub(crate) fn new(budget: &Budget) -> Self {
        let within = match (budget.host_memory, budget.bytes) {
            // How much may be taken was said.
            (HostMemory::Whole, Some(_)) => HostMemory::Front,
            (within, _) => within,
        };
        Self {
            within: (within != HostMemory::Unlimited).then(|| (within, Limits::find())),
            ..Self::default()
        }
    }

    /// The pieces, or parts of them, that fit. The others are lost.
    pub(crate) fn fit(
        &mut self,
        pieces: Vec<Piece>,
        stages: Stages,
        mappings: &Mappings,
        lost: &mut Tally,
    ) -> Vec<Piece> {
        let Some((within, limits)) = &self.within else { return pieces };
        let pieces = match within {
            HostMemory::Whole | HostMemory::UpTo(_) if stages.include(Stage::Host) => {
                files::fit(pieces, stages, mappings, lost)
            }
            _ => pieces,
        };
        let candidates = pieces.into_iter().map(|piece| Candidate::new(piece, stages, mappings)).collect();
        let limit = |pages| limits.tightest(pages, Mapping::Made);
        let Fitted { pieces, needs_ordinary } = fit::fit(candidates, stages, *within, mappings, limit, lost);
        self.is_needed = needs_ordinary;
        pieces
    }

    /// Has a thread make a chunk present, until the grant is dropped. Waits for other threads' chunks where only with
    /// those done it can be told whether there is room; a grant that comes at the run's end is empty.
    ///
    /// # Errors
    /// The limit that is too close by now, whoever has come there: half of its margin is to be left.
    pub(crate) fn grant(
        &self,
        chunk: &Chunk,
        mappings: &Mappings,
        control: &Control,
    ) -> Result<Grant<'_>, Limit> {
        let Some((_, limits)) = self.within.as_ref().filter(|_| self.is_needed) else {
            return Ok(self.grants.nothing());
        };
        self.grants.grant(
            chunk.range.bytes(),
            || limits.tightest(Pages::Ordinary, Mapping::Made),
            || fit::absent(chunk, mappings),
            || control.ended().is_some(),
        )
    }

    /// Wakes those who wait for a grant, to look whether the run is over.
    pub(crate) fn wake(&self) {
        self.grants.wake();
    }
}
