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

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use premap_address_space::limits::{Limit, Limits, Mapping, Pages};
use premap_address_space::{Kind, copied, present};

use crate::budget::{Budget, HostMemory};
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
/// How long a look at the room holds,
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// and for which part of it: so many VMs may start side by side on the same look.
const SHARE: u64 = 8;

/// The room of a run, which has an end only where the caller wants it to.
#[derive(Debug, Default)]
pub(crate) struct Room {
    within: Option<(HostMemory, Limits)>,
    /// Whether the run takes any of it. What it has already is mapped whatever the room.
    is_taken: bool,
    granted: Mutex<Granted>,
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
            HostMemory::Whole if stages.include(Stage::Host) => files::fit(pieces, stages, mappings, lost),
            _ => pieces,
        };
        let looked = |piece: Piece| Looked {
            takes: takes(piece.region, stages, mappings),
            piece,
            present: Vec::new(),
        };
        let pieces = pieces.into_iter().map(looked).collect();
        let kept = fit(pieces, stages, *within, |pages| limits.tightest(pages, Mapping::Made), lost);
        self.is_taken = kept.takes;
        kept.pieces
    }

    /// Has a thread make a chunk present, until what it is given is dropped.
    ///
    /// # Errors
    /// The limit that is too close by now, whoever has come there: half of its margin is to be left.
    pub(crate) fn begin(&self, chunk: &Chunk) -> Result<Taking<'_>, Limit> {
        let nothing = Taking { room: self, bytes: 0 };
        let Some((_, limits)) = self.within.as_ref().filter(|_| self.is_taken) else { return Ok(nothing) };
        let mut bytes = chunk.range.bytes();
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if granted.bytes < bytes || granted.until <= Instant::now() {
            let limit = limits.tightest(Pages::Ordinary, Mapping::Made);
            *granted = granted.renewed(bytes, limit).or_else(|limit| {
                // What of it is present takes nothing.
                bytes = absent(chunk);
                granted.renewed(bytes, Some(limit))
            })?;
        }
        granted.bytes -= bytes;
        granted.taking += bytes;
        Ok(Taking { room: self, bytes })
    }
}

/// What may be taken before the room is looked at again, which costs too much to do for every chunk.
#[derive(Debug)]
struct Granted {
    bytes: u64,
    until: Instant,
    /// What threads have begun to take, and so may not be gone from the room yet.
    taking: u64,
}

impl Default for Granted {
    fn default() -> Self {
        Self { bytes: 0, until: Instant::now(), taking: 0 }
    }
}

impl Granted {
    /// A share of the room that leaves others theirs, but no less than what is wanted now.
    fn renewed(&self, wanted: u64, limit: Option<Limit>) -> Result<Self, Limit> {
        let floor = limit.as_ref().map_or(0, |limit| limit.margin() / 2);
        let left = limit.as_ref().map_or(u64::MAX, |limit| limit.left);
        let room = left.saturating_sub(floor).saturating_sub(self.taking);
        match limit.filter(|_| room < wanted) {
            Some(limit) => Err(limit),
            None => {
                Ok(Self { bytes: (room / SHARE).max(wanted), until: Instant::now() + LOOK_EVERY, ..*self })
            }
        }
    }
}

/// Memory that a thread is taking.
#[must_use]
pub(crate) struct Taking<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let mut granted = self.room.granted.lock().unwrap_or_else(PoisonError::into_inner);
            granted.taking = granted.taking.saturating_sub(self.bytes);
        }
    }
}

/// How much of a chunk is not present.
fn absent(&Chunk { range, host, backing, touch }: &Chunk) -> u64 {
    let piece = Piece { place: 0, region: Region { range, host, backing, touch } };
    let mut looked = Looked { piece, takes: Some(Pages::Ordinary), present: Vec::new() };
    looked.look();
    looked.absent()
}

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
struct Kept {
    pieces: Vec<Piece>,
    /// Whether it takes ordinary pages.
    takes: bool,
}

fn fit(
    mut pieces: Vec<Looked>,
    stages: Stages,
    within: HostMemory,
    room: impl Fn(Pages) -> Option<Limit>,
    lost: &mut Tally,
) -> Kept {
    let mut accounts: Vec<Account> = Vec::new();
    for (piece, pages) in pieces.iter().filter_map(|looked| Some((looked.piece, looked.takes?))) {
        let bytes = cost(pages, piece.region.range.bytes());
        match accounts.iter_mut().find(|account| account.pages == pages) {
            Some(account) => account.wanted = account.wanted.saturating_add(bytes),
            None => accounts.push(Account { pages, limit: room(pages), allowance: 0, wanted: bytes }),
        }
    }
    let mut own = if let HostMemory::UpTo(bytes) = within { bytes } else { u64::MAX };
    let fits = |accounts: &[Account]| {
        let wanted = accounts.iter().fold(0_u64, |sum, account| sum.saturating_add(account.wanted));
        accounts.iter().all(Account::fits) && wanted <= own
    };
    let whole = |pieces: Vec<Looked>, accounts: &[Account]| Kept {
        pieces: pieces.into_iter().map(|looked| looked.piece).collect(),
        takes: accounts.iter().any(|account| account.pages == Pages::Ordinary && account.wanted > 0),
    };
    if fits(&accounts) {
        return whole(pieces, &accounts);
    }
    // Only now is it worth looking at what is there.
    pieces.iter_mut().for_each(Looked::look);
    for account in &mut accounts {
        let of_kind = pieces.iter().filter(|looked| looked.takes == Some(account.pages));
        account.wanted =
            of_kind.fold(0, |sum, looked| sum.saturating_add(cost(account.pages, looked.absent())));
    }
    if fits(&accounts) {
        return whole(pieces, &accounts);
    }
    for account in &mut accounts {
        let spare = account.limit.as_ref().map_or(u64::MAX, Limit::spare);
        account.allowance = if within == HostMemory::Whole && !account.fits() { 0 } else { spare };
    }
    let takes =
        accounts.iter().any(|account| account.pages == Pages::Ordinary && account.allowance.min(own) > 0);
    let mut kept = Vec::new();
    let mut stretches = MOST_STRETCHES;
    for Looked { piece, takes, present } in pieces {
        let Some(account) = accounts.iter_mut().find(|account| Some(account.pages) == takes) else {
            kept.push(piece);
            continue;
        };
        let bytes = piece.region.range.bytes();
        let mut at = 0;
        for there in present.into_iter().chain(std::iter::once(bytes..bytes)) {
            let end = if stretches == 0 { bytes } else { there.start };
            take(piece, at..end, account, &mut own, stages, &mut kept, lost);
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
    Kept { pieces: kept, takes }
}

/// Keeps of an absent part what may be taken, and loses the rest.
fn take(
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
fn keep(piece: Piece, part: Range<u64>, kept: &mut Vec<Piece>) {
    let Some(region) = cut(piece.region, part) else { return };
    match kept.last_mut().filter(|last| (last.place, last.region.touch) == (piece.place, region.touch)) {
        Some(last) if last.region.range.join(region.range).is_some() => {
            last.region.range = last.region.range.join(region.range).unwrap_or(region.range);
        }
        _ => kept.push(Piece { region, ..piece }),
    }
}

/// A part of a region, from one offset to another.
fn cut(region: Region, part: Range<u64>) -> Option<Region> {
    let range =
        if part.end < region.range.bytes() { region.range.split_at(part.end)?.0 } else { region.range };
    let range = if part.start > 0 { range.split_at(part.start)?.1 } else { range };
    (!part.is_empty()).then_some(Region { range, host: region.host.checked_add(part.start)?, ..region })
}

/// A piece, the pages that it takes, and what of it is present, by offset, once that was looked at.
struct Looked {
    piece: Piece,
    takes: Option<Pages>,
    present: Vec<Range<u64>>,
}

impl Looked {
    fn look(&mut self) {
        let Region { range, host, backing, .. } = self.piece.region;
        let start = host.raw();
        let end = start.saturating_add(range.bytes());
        let found = match (self.takes, backing) {
            (None, _) | (_, Backing::GuestMemfd) => Ok(Vec::new()),
            (_, Backing::PrivateFile) => copied(start..end),
            _ => present(start..end),
        };
        // Where that can't be told, all counts as absent.
        let found = found.unwrap_or_default().into_iter();
        let unit = backing.unit();
        let whole = |part: Range<u64>| {
            (part.start - start).next_multiple_of(unit)..(part.end.min(end) - start) / unit * unit
        };
        self.present = found.map(whole).filter(|part| !part.is_empty()).collect();
    }

    fn absent(&self) -> u64 {
        self.present
            .iter()
            .fold(self.piece.region.range.bytes(), |bytes, part| bytes - (part.end - part.start))
    }
}

/// Which pages it takes to make a region present, if any: a read of private memory only borrows the zero page, and a read
/// of a file on disk what the page cache gives back at need.
fn takes(region: Region, stages: Stages, mappings: &Mappings) -> Option<Pages> {
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

#[cfg(test)]
mod tests;
