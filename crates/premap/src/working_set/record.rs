//! Recording: looking again and again at which pages of the guest's memory have become present on the host.
//!
//! On memory that nobody populated, KVM gets a page when the guest first touches it. So the order in which pages turn up is
//! that of first touches, as finely as one looks; those that turned up between two looks are in the order of their
//! addresses. A page that was only read is the zero page, or the page cache's, until it is written; of shared memory that
//! can't be told, and everything counts as written. Where the page cache is read, Linux maps what it has nearby as well,
//! and that is recorded with it.
//!
//! Pages that are there before the guest runs, such as a kernel that the VMM loaded, come first: whether the guest touches
//! them does not show, and it mostly does.

use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use premap_address::{Gpa, GpaRange, Hva, PageSize};
use premap_address_space::{AddressSpace, Exclusivity, Run, State};
use premap_kvm::Errno;

use super::{Identity, RecordError, Touched, WorkingSet, WorkingSetError};
use crate::memory::{Region, Touch};

/// A look may take a share of one processor, and no more: a fifth.
const REST: u32 = 4;

/// By which interface of the kernel a recorder looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The ioctl `PAGEMAP_SCAN`, Linux 6.7.
    PagemapScan,
    /// A record a page, in `/proc/self/pagemap`.
    Pagemap,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PagemapScan => "PAGEMAP_SCAN",
            Self::Pagemap => "/proc/self/pagemap",
        })
    }
}

/// Finds out which pages of a VM's memory are touched, and in which order.
#[derive(Debug)]
pub struct Recorder {
    space: AddressSpace,
    memory: Vec<Watched>,
    /// The pages in the order in which they turned up: whose, and which.
    order: Vec<(usize, usize)>,
    looks: u64,
}

/// A region, and what is known of each of its pages.
#[derive(Debug)]
struct Watched {
    range: GpaRange,
    host: Hva,
    page: PageSize,
    seen: Vec<Option<Touch>>,
}

impl Recorder {
    /// Begins to watch `memory`, which no populate may have touched, with a first look at it.
    ///
    /// # Errors
    /// Where a file of `/proc` is not to be had, or the kernel does not answer.
    pub fn new(memory: &[Region]) -> Result<Self, RecordError> {
        let watched = memory.iter().map(|region| {
            let size = PageSize::ALL.into_iter().rev().find(|size| size.bytes() <= region.backing.unit());
            let page = size.unwrap_or(PageSize::Size4K);
            let pages = usize::try_from(region.range.bytes() / page.bytes()).unwrap_or(usize::MAX);
            Watched { range: region.range, host: region.host, page, seen: vec![None; pages] }
        });
        let mut recorder =
            Self { space: AddressSpace::open()?, memory: watched.collect(), order: Vec::new(), looks: 0 };
        recorder.look()?;
        Ok(recorder)
    }

    /// Looks once.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn look(&mut self) -> Result<(), RecordError> {
        for (index, watched) in self.memory.iter_mut().enumerate() {
            let end = watched.host.wrapping_add(watched.range.bytes());
            let runs = self.space.query_all(watched.host..end, Exclusivity::Assume);
            for run in runs.map_err(RecordError::Look)? {
                watched.note(&run, |page| self.order.push((index, page)));
            }
        }
        self.looks += 1;
        Ok(())
    }

    /// Looks every `interval`, or less often where a look takes long, while `run` is at work, and once more after it.
    /// The looks are on a thread of their own; a VMM that wants none calls [`look`](Self::look) from its event loop.
    ///
    /// # Errors
    /// Where the kernel does not answer; `run` has come to its end then too. Where there can be no thread, `run` was not
    /// begun.
    ///
    /// # Panics
    /// If `run` does.
    pub fn watch<R>(&mut self, interval: Duration, run: impl FnOnce() -> R) -> Result<R, RecordError> {
        let result = thread::scope(|scope| {
            // Dropped where `run` panics, too, which ends the watcher.
            let (over, wait) = channel::<()>();
            let recorder = &mut *self;
            let look = move || -> Result<(), RecordError> {
                let mut pause = interval;
                while wait.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    let begun = Instant::now();
                    recorder.look()?;
                    pause = interval.max(begun.elapsed() * REST);
                }
                Ok(())
            };
            let thread = thread::Builder::new().name("premap-record".to_owned());
            let watcher = thread.spawn_scoped(scope, look).map_err(RecordError::Spawn)?;
            let result = run();
            drop(over);
            watcher.join().unwrap_or(Err(RecordError::Look(Errno::CANCELED))).map(|()| result)
        })?;
        self.look()?;
        Ok(result)
    }

    /// How often it has looked.
    #[must_use]
    pub fn looks(&self) -> u64 {
        self.looks
    }

    /// How it looks.
    #[must_use]
    pub fn method(&self) -> Method {
        if self.space.scans() { Method::PagemapScan } else { Method::Pagemap }
    }

    /// What was touched so far.
    ///
    /// # Errors
    /// Regions that overlap.
    pub fn finish(self, identity: Identity) -> Result<WorkingSet, WorkingSetError> {
        let mut touched: Vec<Touched> = Vec::new();
        for (index, page) in &self.order {
            let Some(next) = self.memory[*index].touched(*page) else { continue };
            let joined = touched
                .last()
                .filter(|last| last.touch == next.touch)
                .and_then(|last| last.range.join(next.range));
            match (joined, touched.last_mut()) {
                (Some(range), Some(last)) => last.range = range,
                _ => touched.push(next),
            }
        }
        // Regions of several page sizes are of the smallest one's pages, too.
        let page = self.memory.iter().map(|watched| watched.page).min().unwrap_or(PageSize::Size4K);
        WorkingSet::new(identity, page, touched)
    }
}

impl Watched {
    /// Takes note of the pages of a run that are there, and calls back for those that are new.
    fn note(&mut self, run: &Run, mut turned_up: impl FnMut(usize)) {
        let touch = match run.state {
            State::NoAccess | State::Absent => return,
            State::Readable => Touch::Read,
            State::Writable => Touch::Write,
        };
        for page in self.pages(run) {
            let Some(seen) = self.seen.get_mut(page) else { return };
            if seen.is_none() {
                turned_up(page);
            }
            if *seen != Some(Touch::Write) {
                *seen = Some(touch);
            }
        }
    }

    /// Which pages a run has, as indices.
    fn pages(&self, run: &Run) -> Range<usize> {
        let index = |hva: Hva, round: u64| {
            let offset = hva.checked_offset_from(self.host).unwrap_or_default();
            usize::try_from((offset + round) / self.page.bytes()).unwrap_or(usize::MAX)
        };
        index(run.start, 0)..index(run.end(), self.page.bytes() - 1)
    }

    fn touched(&self, page: usize) -> Option<Touched> {
        let touch = (*self.seen.get(page)?)?;
        let start = Gpa::new(self.range.start().raw() + page as u64 * self.page.bytes());
        Some(Touched { range: GpaRange::try_new(start, self.page.bytes()).ok()?, touch })
    }
}
