//! Cuts a plan to what there is room for, before its run begins.

use std::ops::Range;

use premap_address_space::limits::{Limit, Pages};
use premap_address_space::{Kind, copied, present};
use premap_kvm::Errno;

use crate::budget::HostMemory;
use crate::engine::Stages;
use crate::mappings::{Mappings, host_range};
use crate::memory::{Backing, Region, Touch};
use crate::plan::{Chunk, Piece};
use crate::report::{Reason, Stage};
use crate::survey::reason_at;
use crate::tally::Tally;

/// How many stretches of present memory are mapped of a plan that does not fit; memory that is scattered more widely is
/// left to the guest's faults, so that the report stays of a size.
const MOST_STRETCHES: usize = 4096;
/// The second-stage tables and the host's take 1/512 of the memory each, where it is in pages of 4 KiB.
const TABLES: u64 = 256;

/// What a plan takes of one kind of pages, and what of it there is.
struct Account {
    pages: Pages,
    limit: Option<Limit>,
    /// What may be taken yet.
    allowance: u64,
    wanted: u64,
}

impl Account {
    fn fits(&self) -> bool {
        self.wanted <= self.limit.as_ref().map_or(u64::MAX, Limit::spare)
    }
}

/// What of a plan is mapped.
#[derive(Debug)]
pub(super) struct Fitted {
    pub(super) pieces: Vec<Piece>,
    /// Whether that needs any ordinary pages beyond those that are present.
    pub(super) needs_ordinary: bool,
}

/// Fits candidates within the `limit` on each kind of pages. What does not fit is lost.
pub(super) fn fit(
    mut candidates: Vec<Candidate>,
    stages: Stages,
    within: HostMemory,
    mappings: &Mappings,
    limit: impl Fn(Pages) -> Option<Limit>,
    lost: &mut Tally,
) -> Fitted {
    let mut accounts: Vec<Account> = Vec::new();
    for (piece, pages) in candidates.iter().filter_map(|candidate| Some((candidate.piece, candidate.pages?)))
    {
        let bytes = cost(pages, piece.region.range.bytes());
        match accounts.iter_mut().find(|account| account.pages == pages) {
            Some(account) => account.wanted = account.wanted.saturating_add(bytes),
            None => accounts.push(Account { pages, limit: limit(pages), allowance: 0, wanted: bytes }),
        }
    }
    let mut own = if let HostMemory::UpTo(bytes) = within { bytes } else { u64::MAX };
    let fits = |accounts: &[Account]| {
        let wanted = accounts.iter().fold(0_u64, |sum, account| sum.saturating_add(account.wanted));
        accounts.iter().all(Account::fits) && wanted <= own
    };
    let whole = |candidates: Vec<Candidate>, accounts: &[Account]| Fitted {
        pieces: candidates.into_iter().map(|candidate| candidate.piece).collect(),
        needs_ordinary: accounts.iter().any(|account| account.pages == Pages::Ordinary && account.wanted > 0),
    };
    if fits(&accounts) {
        return whole(candidates, &accounts);
    }
    // Only now is it worth looking at what is there.
    candidates.iter_mut().for_each(|candidate| candidate.look(mappings));
    for account in &mut accounts {
        let of_kind = candidates.iter().filter(|candidate| candidate.pages == Some(account.pages));
        account.wanted =
            of_kind.fold(0, |sum, candidate| sum.saturating_add(cost(account.pages, candidate.absent())));
    }
    if fits(&accounts) {
        return whole(candidates, &accounts);
    }
    for account in &mut accounts {
        let spare = account.limit.as_ref().map_or(u64::MAX, Limit::spare);
        account.allowance = if within == HostMemory::Whole && !account.fits() { 0 } else { spare };
    }
    let needs_ordinary =
        accounts.iter().any(|account| account.pages == Pages::Ordinary && account.allowance.min(own) > 0);
    let mut kept = Vec::new();
    let mut stretches = MOST_STRETCHES;
    for Candidate { piece, pages, present } in candidates {
        let Some(account) = accounts.iter_mut().find(|account| Some(account.pages) == pages) else {
            kept.push(piece);
            continue;
        };
        let bytes = piece.region.range.bytes();
        let mut at = 0;
        for there in present.into_iter().chain(std::iter::once(bytes..bytes)) {
            let end = if stretches == 0 { bytes } else { there.start };
            fit_part(piece, at..end, account, &mut own, stages, &mut kept, lost);
            at = end.max(there.end);
            if stretches == 0 {
                break;
            }
            if there.start < there.end {
                keep(piece, there, &mut kept);
                stretches -= 1;
            }
        }
    }
    Fitted { pieces: kept, needs_ordinary }
}

/// Keeps of an absent part what may be taken, and loses the rest.
fn fit_part(
    piece: Piece,
    part: Range<u64>,
    account: &mut Account,
    own: &mut u64,
    stages: Stages,
    kept: &mut Vec<Piece>,
    lost: &mut Tally,
) {
    if part.is_empty() {
        return;
    }
    let unit = piece.region.backing.unit();
    let wanted = cost(account.pages, part.end - part.start);
    let most = account.allowance.min(*own);
    if wanted <= most {
        account.allowance -= wanted;
        *own -= wanted;
        keep(piece, part, kept);
        return;
    }
    let limited = account.limit.as_ref().filter(|_| account.allowance <= *own);
    let why = limited.map_or(Reason::Budget, |limit| Reason::HostMemory(limit.kind));
    if let Some(limit) = limited {
        lost.limit.get_or_insert_with(|| limit.to_string());
    }
    let head = bytes_for(account.pages, most) / unit * unit;
    // What comes behind is less important, so it does not get what is left over.
    (account.allowance, *own) = (0, if why == Reason::Budget { 0 } else { *own });
    keep(piece, part.start..part.start + head, kept);
    if let Some(region) = cut(piece.region, part.start + head..part.end) {
        for stage in [Stage::Host, Stage::Second] {
            lost.lost(piece.place, stage, region.range, reason_at(stage, stages, why));
        }
    }
}

/// Adds a part of a piece to those that are kept.
pub(super) fn keep(piece: Piece, part: Range<u64>, kept: &mut Vec<Piece>) {
    let Some(region) = cut(piece.region, part) else { return };
    match kept.last_mut().filter(|last| (last.place, last.region.touch) == (piece.place, region.touch)) {
        Some(last) if last.region.range.join(region.range).is_some() => {
            last.region.range = last.region.range.join(region.range).unwrap_or(region.range);
        }
        _ => kept.push(Piece { region, ..piece }),
    }
}

/// A part of a region, from one offset to another.
pub(super) fn cut(region: Region, part: Range<u64>) -> Option<Region> {
    let range =
        if part.end < region.range.bytes() { region.range.split_at(part.end)?.0 } else { region.range };
    let range = if part.start > 0 { range.split_at(part.start)?.1 } else { range };
    (!part.is_empty()).then_some(Region { range, host: region.host.checked_add(part.start)?, ..region })
}

/// A piece that may or may not fit.
pub(super) struct Candidate {
    piece: Piece,
    /// The pages that it needs, if any, to be present.
    pages: Option<Pages>,
    /// What of it is present, by offset, once that was looked at.
    present: Vec<Range<u64>>,
}

impl Candidate {
    pub(super) fn new(piece: Piece, stages: Stages, mappings: &Mappings) -> Self {
        Self { piece, pages: pages_needed(piece.region, stages, mappings), present: Vec::new() }
    }

    fn look(&mut self, mappings: &Mappings) {
        let Region { range, host, backing, .. } = self.piece.region;
        let host = host_range(host, range.bytes());
        let found = match (self.pages, backing) {
            (None, _) | (_, Backing::GuestMemfd) => Ok(Vec::new()),
            (_, Backing::PrivateFile) => copied(host.clone()),
            (_, Backing::Shared) => resident(host.clone(), mappings),
            _ => present(host.clone()),
        };
        // Where that can't be told, all counts as absent.
        let found = found.unwrap_or_default().into_iter();
        let unit = backing.unit();
        let whole = |part: Range<u64>| {
            (part.start - host.start).next_multiple_of(unit)
                ..(part.end.min(host.end) - host.start) / unit * unit
        };
        self.present = found.map(whole).filter(|part| !part.is_empty()).collect();
    }

    fn absent(&self) -> u64 {
        self.present
            .iter()
            .fold(self.piece.region.range.bytes(), |bytes, part| bytes - (part.end - part.start))
    }
}

/// What of shared memory is present, mapped here or not.
fn resident(host: Range<u64>, mappings: &Mappings) -> Result<Vec<Range<u64>>, Errno> {
    let mut found = Vec::new();
    for (part, area) in mappings.behind(host.clone()).unwrap_or_else(|| vec![(host, None)]) {
        found.append(&mut match area {
            Some(area) => area.resident(part)?,
            None => present(part)?,
        });
    }
    Ok(found)
}

/// Which pages are needed to make a region present, if any: a read of private memory only borrows the zero page, and a read
/// of a file on disk what the page cache gives back at need.
fn pages_needed(region: Region, stages: Stages, mappings: &Mappings) -> Option<Pages> {
    let Region { range, host, backing, touch } = region;
    let on_disk = || {
        let behind = mappings.behind(host_range(host, range.bytes())).unwrap_or_default();
        behind.iter().any(|(_, area)| area.as_ref().is_some_and(|area| area.kind == Kind::SharedFile))
    };
    match backing {
        Backing::Hugetlb(size) => Some(Pages::Hugetlb(size.bytes())),
        Backing::Shared => (touch == Touch::Write || !on_disk()).then_some(Pages::Ordinary),
        Backing::GuestMemfd => stages.include(Stage::Second).then_some(Pages::Ordinary),
        Backing::Anonymous | Backing::PrivateFile => {
            (touch == Touch::Write && stages.include(Stage::Host)).then_some(Pages::Ordinary)
        }
    }
}

/// What so much memory takes, page tables included.
fn cost(pages: Pages, bytes: u64) -> u64 {
    match pages {
        Pages::Ordinary => bytes.saturating_add(bytes / TABLES),
        Pages::Hugetlb(_) => bytes,
    }
}

/// How much memory can be had for so much.
fn bytes_for(pages: Pages, cost: u64) -> u64 {
    match pages {
        Pages::Ordinary => cost / (TABLES + 1) * TABLES,
        Pages::Hugetlb(_) => cost,
    }
}

/// How much of a chunk is not present.
pub(super) fn absent(&Chunk { range, host, backing, touch }: &Chunk, mappings: &Mappings) -> u64 {
    let piece = Piece { place: 0, region: Region { range, host, backing, touch } };
    let mut candidate = Candidate { piece, pages: Some(Pages::Ordinary), present: Vec::new() };
    candidate.look(mappings);
    candidate.absent()
}

#[cfg(test)]
mod tests;
