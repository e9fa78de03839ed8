//! What lies behind a plan's memory, as Linux says: looked at before any of it is touched, and again when calls fail.
//!
//! Three kinds of memory must not be populated blindly. A populate on memory that is registered with userfaultfd raises one
//! event a page and, with nobody answering, comes back for SIGKILL alone. A write to a hole of a file on disk allocates it
//! there. And memory that can't be had at all, a pool without access or a full file system, fails page by page.
//!
//! So [`Mappings`] is read from `/proc/self/smaps` before a run, and again after the VMM has closed the gate: memory may
//! have been registered or mapped anew meanwhile. Where `/proc` can't be read, nothing is known and every call is tried.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use premap_address::{Gpa, GpaRange, Hva, PAGE_SIZE};
use premap_address_space::{Area, Kind, MappedFile, areas};
use premap_kvm::Errno;

use crate::engine::Stages;
use crate::memory::Touch;
use crate::plan::Chunk;
use crate::report::{BlamedFile, Reason, Stage};

/// Without a look, this much at most is taken to fail for what its first pages failed for.
const MOST_GUESSED: u64 = 256 << 20;

/// The process's mappings, and what has turned out to fail.
#[derive(Debug)]
pub(crate) struct Mappings(Mutex<State>);

#[derive(Debug)]
struct State {
    /// How often the gate had been closed when this was read.
    changes: u64,
    /// In ascending order; `None` where they can't be read.
    areas: Option<Vec<Area>>,
    /// Host addresses where calls are known to fail.
    failing: Vec<Failing>,
    /// The files behind them.
    blamed: Vec<BlamedFile>,
}

#[derive(Clone, Debug)]
struct Failing {
    host: Range<u64>,
    reason: Reason,
}

/// What is to be done with the first bytes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outlook {
    /// So many may be populated.
    Fine(u64),
    /// So many are lost, for this reason.
    Lost(u64, Reason),
}

impl Mappings {
    /// Reads them, if a run of these stages wants to know; the gate had been closed `changes` times.
    pub(crate) fn read(stages: Stages, changes: u64) -> Self {
        let areas = if stages.include(Stage::Host) { areas().ok() } else { None };
        let (failing, blamed) = Default::default();
        Self(Mutex::new(State { changes, areas, failing, blamed }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What lies behind a host range: parts of mappings, each with its area, and parts of nothing. `None` where that can't
    /// be known.
    pub(crate) fn behind(&self, host: Range<u64>) -> Option<Vec<(Range<u64>, Option<Area>)>> {
        let state = self.lock();
        let areas = state.areas.as_ref()?;
        let first = areas.partition_point(|area| area.end <= host.start);
        let (mut at, mut parts) = (host.start, Vec::new());
        for area in areas[first..].iter().take_while(|area| area.start < host.end) {
            if area.start > at {
                parts.push((at..area.start, None));
            }
            let part = at.max(area.start)..area.end.min(host.end);
            at = part.end;
            parts.push((part, Some(area.clone())));
        }
        if at < host.end {
            parts.push((at..host.end, None));
        }
        Some(parts)
    }

    /// Whether the gate has been closed since they were read.
    pub(crate) fn are_stale(&self, changes: u64) -> bool {
        self.lock().changes < changes
    }

    /// Reads them anew; the gate had been closed `changes` times. Not to be done inside the gate: the kernel walks all page
    /// tables for it, and whoever closes the gate would wait for that.
    pub(crate) fn read_anew(&self, changes: u64) {
        let areas = areas().ok();
        let mut state = self.lock();
        if state.changes < changes {
            (state.changes, state.areas) = (changes, areas);
        }
    }

    /// What is known of the chunk's first bytes.
    pub(crate) fn outlook(&self, chunk: &Chunk) -> Outlook {
        let state = self.lock();
        let host = chunk.host.raw()..chunk.host.raw().saturating_add(chunk.range.bytes());
        let handled = state.areas.iter().flatten().filter(|area| area.kind == Kind::Userfault);
        let handled = handled.map(|area| (area.start..area.end, Reason::Userfault));
        let failing = state.failing.iter().map(|failing| (failing.host.clone(), failing.reason));
        let ahead = handled.chain(failing).filter(|(lost, _)| lost.start < host.end && lost.end > host.start);
        match ahead.min_by_key(|(lost, _)| lost.start) {
            None => Outlook::Fine(chunk.range.bytes()),
            Some((lost, _)) if lost.start > host.start => Outlook::Fine(lost.start - host.start),
            Some((lost, reason)) => Outlook::Lost(lost.end.min(host.end) - host.start, reason),
        }
    }

    /// Takes note that the pages of `failed`, just before `next`, have all failed with `errno`, finds out why, and gives
    /// the reason. What lies behind them in the same mapping will fail too.
    pub(crate) fn blame(&self, failed: &GpaRange, next: &Chunk, errno: Errno) -> Reason {
        let areas = areas().ok();
        let mut state = self.lock();
        state.areas = areas;
        let start = next.host.raw();
        let (end, reason, path) = state.judge(start.saturating_sub(1), next, errno);
        if end > start {
            state.failing.push(Failing { host: start..end, reason });
        }
        state.blamed.extend(path.map(|path| BlamedFile { gpa: failed.start(), path }));
        reason
    }

    /// Takes note that memory from `gpa` on is left since a file's file system has no room for it.
    pub(crate) fn note_full(&self, gpa: Gpa, file: &MappedFile) {
        self.lock().blamed.push(BlamedFile { gpa, path: file.path.clone() });
    }

    /// The files that are to blame for what failed.
    pub(crate) fn blamed(&self) -> Vec<BlamedFile> {
        self.lock().blamed.clone()
    }
}

impl State {
    /// How far what failed at `host` will go on failing, why, and the file behind it.
    fn judge(&self, host: u64, chunk: &Chunk, errno: Errno) -> (u64, Reason, Option<PathBuf>) {
        let Some(areas) = &self.areas else {
            // The further such a stretch goes on, the more of it is taken for granted.
            let before = self.failing.last().filter(|last| last.host.end + (1 << 20) >= host);
            let stretch = before.map_or(0, |last| 2 * (last.host.end - last.host.start)).min(MOST_GUESSED);
            let end = chunk.host.raw().saturating_add(chunk.range.bytes().max(stretch));
            return (end, Reason::Errno(errno), None);
        };
        let at = areas.partition_point(|area| area.end <= host);
        let Some(area) = areas.get(at).filter(|area| area.start <= host) else {
            let end = areas.get(at).map_or(u64::MAX, |next| next.start);
            return (end, Reason::NotMapped, None);
        };
        if let Some(reason) = forbids(area, chunk.touch) {
            return (area.end, reason, None);
        }
        let Some(file) = &area.file else {
            let reason = match area.kind {
                Kind::Hugetlb(_) => Reason::NoHugePage,
                _ => Reason::Errno(errno),
            };
            return (area.end, reason, None);
        };
        let offset = file.offset + (host - area.start);
        let reason = if matches!(area.kind, Kind::Hugetlb(_)) {
            Reason::NoHugePage
        } else if file.bytes().is_ok_and(|bytes| offset >= bytes) {
            Reason::BeyondFile
        } else if file.room().is_ok_and(|room| room < PAGE_SIZE) {
            // What it has already needs no space.
            let data =
                file.data(offset..file.offset.saturating_add(area.end - area.start)).unwrap_or_default();
            let end =
                data.first().map_or(area.end, |data| area.start + (data.start.max(offset) - file.offset));
            return (end.min(area.end), Reason::NoSpace, Some(file.path.clone()));
        } else {
            Reason::Errno(errno)
        };
        (area.end, reason, Some(file.path.clone()))
    }
}

/// Why an area can't be touched in this way at all.
pub(crate) fn forbids(area: &Area, touch: Touch) -> Option<Reason> {
    match area.kind {
        Kind::Userfault => Some(Reason::Userfault),
        Kind::Device => Some(Reason::Device),
        Kind::Closed => Some(Reason::NoAccess),
        _ if touch == Touch::Write && !area.writable => Some(Reason::NoAccess),
        _ => None,
    }
}

/// The host range of a chunk or region.
pub(crate) fn host_range(host: Hva, bytes: u64) -> Range<u64> {
    host.raw()..host.raw().saturating_add(bytes)
}
