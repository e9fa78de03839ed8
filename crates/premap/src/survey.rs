//! Looks at what a plan's memory is before any of it is touched, and takes out what must not be.
//!
//! | behind the memory | what is done |
//! |---|---|
//! | anonymous memory, shmem, hugetlb; a private mapping of a file, to be written | populated as the plan says |
//! | a shared mapping of a file on disk, to be written | its data is read; its holes are left, since a write would allocate them |
//! | a private mapping of a file, to be read | its data is read; its holes are left, which tmpfs would allocate for a read |
//! | memory registered with userfaultfd | left to its handler |
//! | a device's memory, no access, nothing at all | left |
//!
//! A run without a host stage is not looked at: a second stage alone writes nothing, and waits for a handler in a way that
//! can be interrupted.

use std::ops::Range;

use premap_address::{Gpa, GpaRange, Hva};
use premap_address_space::{Area, Kind, cached};

use crate::engine::Stages;
use crate::mappings::{Mappings, forbids, host_range};
use crate::memory::{Backing, Region, Touch};
use crate::plan::Piece;
use crate::report::{Fate, Reason, Stage};
use crate::tally::Tally;

/// What of a plan is to be mapped, and what was lost before it began.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) lost: Tally,
}

/// What is done with a file whose holes can't be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unseen {
    Take,
    Leave,
}

/// Looks at what the pieces are.
pub(crate) fn survey(pieces: Vec<Piece>, stages: Stages, mappings: &Mappings) -> Survey {
    let mut survey = Survey::default();
    if !stages.include(Stage::Host) {
        return Survey { pieces, ..survey };
    }
    for piece in pieces {
        let Region { range, host, backing, .. } = piece.region;
        let parts = mappings.behind(host_range(host, range.bytes()));
        match parts {
            Some(parts) if backing != Backing::GuestMemfd => {
                for (part, area) in parts {
                    if let Some(region) = within(&piece.region, part.start, part.end) {
                        survey.judge(Piece { region, ..piece }, stages, area.as_ref());
                    }
                }
            }
            _ => survey.take(piece),
        }
    }
    survey
}

impl Survey {
    fn judge(&mut self, piece: Piece, stages: Stages, area: Option<&Area>) {
        let touch = piece.region.touch;
        let refused = area.map_or(Some(Reason::NotMapped), |area| forbids(area, touch));
        match (refused, area) {
            (Some(reason), _) => self.lose(&piece, stages, reason),
            (None, Some(area)) => match (area.kind, touch) {
                (Kind::SharedFile, Touch::Write) => self.read_data(piece, stages, area, Unseen::Leave),
                (Kind::PrivateFile, Touch::Read) => {
                    let in_memory = area.file.as_ref().is_some_and(|file| file.in_memory);
                    let unseen = if in_memory { Unseen::Leave } else { Unseen::Take };
                    self.read_data(piece, stages, area, unseen);
                }
                _ => self.take(piece),
            },
            (None, _) => self.take(piece),
        }
    }

    /// Has a file's data read, and leaves its holes.
    fn read_data(&mut self, piece: Piece, stages: Stages, area: &Area, unseen: Unseen) {
        let Region { range, host, .. } = piece.region;
        if area.file.is_none() {
            return self.take(piece);
        }
        let here = host_range(host, range.bytes());
        let data = match (data_behind(area, here.clone()), unseen) {
            (Some(data), _) => data,
            (None, Unseen::Take) => return self.take(piece),
            (None, Unseen::Leave) => return self.lose(&piece, stages, Reason::UnknownFile),
        };
        let (first, end) = (here.start, here.end);
        let part = |from: u64, to: u64| {
            let region = within(&piece.region, from, to)?;
            Some(Piece { region: Region { touch: Touch::Read, ..region }, ..piece })
        };
        let page = premap_address::PAGE_SIZE;
        let mut at = first;
        for data in data {
            let (start, stop) = (data.start / page * page, data.end.next_multiple_of(page).min(end));
            if let Some(hole) = part(at, start.max(at)) {
                self.lose(&hole, stages, Reason::FileHole);
            }
            if let Some(data) = part(start.max(at), stop) {
                self.take(data);
            }
            at = stop.max(at);
        }
        if let Some(hole) = part(at, end) {
            self.lose(&hole, stages, Reason::FileHole);
        }
    }

    fn take(&mut self, piece: Piece) {
        self.pieces.push(piece);
    }

    fn lose(&mut self, piece: &Piece, stages: Stages, reason: Reason) {
        let Piece { place, region: Region { range, .. } } = *piece;
        for stage in [Stage::Host, Stage::Second] {
            self.lost.lost(place, stage, range, reason_at(stage, stages, reason));
        }
    }
}

/// Where in a range of a file's mapping the file has data.
fn data_behind(area: &Area, host: Range<u64>) -> Option<Vec<Range<u64>>> {
    let in_memory = area.file.as_ref().is_some_and(|file| file.in_memory);
    match area.data(host.clone()) {
        Ok(data) => Some(data),
        // A file without a name. Of one in memory, what is cached is what there is.
        Err(_) if in_memory => cached(host).ok(),
        Err(_) => None,
    }
}

/// What memory that the host stage does not make present is called at each stage.
pub(crate) fn reason_at(stage: Stage, stages: Stages, reason: Reason) -> Reason {
    match stage {
        _ if !stages.include(stage) => Reason::NotAsked,
        // What the run's end cut off is worth another try at both stages; what the host refused is not.
        Stage::Second if reason.fate() == Fate::Failed && stages.include(Stage::Host) => {
            Reason::HostStageFailed
        }
        _ => reason,
    }
}

/// The part of a region between two host addresses in it, if it is not empty.
fn within(region: &Region, start: u64, end: u64) -> Option<Region> {
    let offset = start.checked_sub(region.host.raw())?;
    let gpa = Gpa::new(region.range.start().raw().checked_add(offset)?);
    let range = GpaRange::try_new(gpa, end.checked_sub(start)?).ok()?;
    Some(Region { range, host: Hva::new(start), ..*region })
}
