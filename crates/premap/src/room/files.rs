//! The room of file systems in memory: a plan whose files can't all be filled in them fills none.
//!
//! A guest goes on in a file system that has room for what it writes, and fails at its next page once that is taken for
//! pages it may never write. What the files have already takes nothing more.

use std::ops::Range;

use premap_address_space::{Kind, MappedFile, present};

use super::fit::{cut, keep};
use crate::engine::Stages;
use crate::mappings::{Mappings, host_range};
use crate::memory::{Backing, Region};
use crate::plan::Piece;
use crate::report::{Reason, Stage};
use crate::survey::reason_at;
use crate::tally::Tally;

/// A piece in a file, and what of it the file has, by offset in the piece.
struct InFile {
    file: MappedFile,
    there: Vec<Range<u64>>,
    absent: u64,
}

impl InFile {
    /// `None` where the piece is in no such file, or nothing can be told of it.
    fn of(region: &Region, mappings: &Mappings) -> Option<Self> {
        let host = host_range(region.host, region.range.bytes());
        let behind = mappings.behind(host.clone()).filter(|_| region.backing == Backing::Shared)?;
        let [(_, Some(area))] = behind.as_slice() else { return None };
        let file = area.file.clone().filter(|_| area.kind == Kind::Shared)?;
        // A file without a name is known only by what is mapped of it here.
        let there =
            area.data(host.clone()).or_else(|_| present(host.clone())).unwrap_or_default().into_iter();
        let there: Vec<_> = there.map(|part| part.start - host.start..part.end - host.start).collect();
        let absent = there.iter().fold(region.range.bytes(), |rest, data| rest - (data.end - data.start));
        Some(Self { file, there, absent })
    }
}

/// Takes out what does not fit.
pub(super) fn fit(pieces: Vec<Piece>, stages: Stages, mappings: &Mappings, lost: &mut Tally) -> Vec<Piece> {
    let pieces: Vec<_> =
        pieces.into_iter().map(|piece| (piece, InFile::of(&piece.region, mappings))).collect();
    let mut wanted: Vec<(&MappedFile, u64)> = Vec::new();
    for InFile { file, absent, .. } in pieces.iter().filter_map(|(_, in_file)| in_file.as_ref()) {
        match wanted.iter_mut().find(|(known, _)| known.device == file.device) {
            Some((_, bytes)) => *bytes = bytes.saturating_add(*absent),
            None => wanted.push((file, *absent)),
        }
    }
    let full = wanted.into_iter().filter(|(file, bytes)| file.room().is_ok_and(|room| room < *bytes));
    let full: Vec<_> = full.map(|(file, _)| file.device).collect();
    let mut kept = Vec::new();
    for (piece, in_file) in pieces {
        let Some(in_file) = in_file.filter(|in_file| full.contains(&in_file.file.device)) else {
            kept.push(piece);
            continue;
        };
        let bytes = piece.region.range.bytes();
        let mut at = 0;
        for there in in_file.there.into_iter().chain(std::iter::once(bytes..bytes)) {
            if let Some(hole) = cut(piece.region, at..there.start) {
                mappings.note_full(hole.range.start(), &in_file.file);
                for stage in [Stage::Host, Stage::Second] {
                    lost.lost(piece.place, stage, hole.range, reason_at(stage, stages, Reason::NoSpace));
                }
            }
            at = there.end;
            keep(piece, there, &mut kept);
        }
    }
    kept
}
