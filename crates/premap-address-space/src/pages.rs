//! Which pages of a mapping are present, and which of those may be written.
//!
//! For memory that is all there, which is what pre-faulting meets when the host stage came first, `PAGEMAP_SCAN` is asked
//! for the *exceptions*: pages that are absent, zero or huge. The kernel then passes over ordinary pages without putting
//! anything out, three times faster than with every page reported, and six times faster than reading
//! `/proc/self/pagemap`, which looks at each page's own record.
//!
//! That record alone says whether a private page is ours alone ([`Exclusivity`]), so it is read where that matters.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use premap_address::{Hva, PAGE_SIZE, PageSize};
use rustix::io::Errno;

use super::mappings::Mapping;
use crate::scan::{HUGE, PRESENT, Region, Wanted, ZERO, scan};
use crate::{Run, State, Unopened, errno, open};

/// How hard to ask whether a private page is shared with another process (by fork) or another address (by KSM).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusivity {
    /// Takes a private page that is neither the zero page nor the page cache's for ours alone: true of a process that
    /// neither forked nor merges its memory.
    Assume,
    /// Asks, for about 40 ns a page.
    Ask,
}

/// Bits of an entry of `/proc/self/pagemap`, from the kernel's `admin-guide/mm/pagemap.rst`.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_EXCLUSIVE: u64 = 1 << 56;

/// Regions and entries a call.
const AT_ONCE: usize = 512;

/// The process's page tables.
#[derive(Debug)]
pub(crate) struct Pages {
    pagemap: File,
    /// Cleared by the first ENOTTY: a kernel before 6.7.
    has_scan: AtomicBool,
}

impl Pages {
    pub(crate) fn open() -> Result<Self, Unopened> {
        Ok(Self { pagemap: open("/proc/self/pagemap")?, has_scan: AtomicBool::new(true) })
    }

    pub(crate) fn scans(&self) -> bool {
        self.has_scan.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn use_scan(&self, use_it: bool) {
        self.has_scan.store(use_it, Ordering::Relaxed);
    }

    /// Pushes runs that cover `range`, which lies in `mapping`, from its start on.
    pub(crate) fn query(
        &self,
        mapping: &Mapping,
        range: Range<Hva>,
        exclusivity: Exclusivity,
        runs: &mut Vec<Run>,
    ) -> Result<(), Errno> {
        // A private mapping of a file shows the page cache until it is written, and only the page's record tells which.
        let small = mapping.file || exclusivity == Exclusivity::Ask;
        if self.has_scan.load(Ordering::Relaxed) {
            match self.exceptions(mapping, range.clone(), runs) {
                Ok(()) if mapping.shared || !mapping.write => return Ok(()),
                Ok(()) => return self.refine(runs, small),
                Err(Errno::NOTTY) => self.has_scan.store(false, Ordering::Relaxed),
                Err(errno) => return Err(errno),
            }
        }
        runs.clear();
        self.entries(mapping, range, runs)
    }

    /// By `PAGEMAP_SCAN`, if the kernel has it. Stops short of the end of `range` where the exceptions are too many for one call.
    fn exceptions(&self, mapping: &Mapping, range: Range<Hva>, runs: &mut Vec<Run>) -> Result<(), Errno> {
        let wanted = Wanted {
            inverted: PRESENT,
            any: PRESENT | ZERO | HUGE,
            told: PRESENT | ZERO | HUGE,
            ..Wanted::default()
        };
        let mut regions = [Region::default(); AT_ONCE];
        let (found, end) = scan(&self.pagemap, &range, wanted, &mut regions)?;
        let ordinary = if mapping.write { State::Writable } else { State::Readable };
        let mut at = range.start;
        for region in found {
            let (start, end) = (Hva::new(region.start), Hva::new(region.end));
            if at < start {
                runs.push(Run::new(at..start, ordinary, PageSize::Size4K));
            }
            let size = match (region.categories & HUGE != 0, mapping.page_size) {
                (false, _) => PageSize::Size4K,
                (true, PageSize::Size1G) => PageSize::Size1G,
                (true, _) => PageSize::Size2M,
            };
            let state = match region.categories & (PRESENT | ZERO) {
                PRESENT => ordinary,
                0 => State::Absent,
                _ => State::Readable,
            };
            runs.push(Run::new(start..end, state, size));
            at = end;
        }
        if at < end {
            runs.push(Run::new(at..end, ordinary, PageSize::Size4K));
        }
        Ok(())
    }

    /// Splits a scan's writable runs of a private mapping by what the pages' records say: those of huge pages, since
    /// the huge zero page is not always told as a zero page, and those of small pages where `small` asks for it.
    fn refine(&self, runs: &mut Vec<Run>, small: bool) -> Result<(), Errno> {
        let huge = |run: &Run| run.size > PageSize::Size4K;
        if !runs.iter().any(|run| run.state == State::Writable && (small || huge(run))) {
            return Ok(());
        }
        for run in std::mem::take(runs) {
            if run.state != State::Writable || !(small || huge(&run)) {
                runs.push(run);
                continue;
            }
            // One record stands for a whole huge page.
            let end = run.start.wrapping_add(run.pages * PAGE_SIZE);
            let mut at = run.start;
            while at < end {
                let next = match at.align_down(run.size).checked_add(run.size.bytes()) {
                    Some(next) if huge(&run) => next.min(end),
                    _ => end,
                };
                let asked = if huge(&run) { at..at.wrapping_add(PAGE_SIZE) } else { at..next };
                self.for_each_entry(asked, |start, entry| {
                    // A page that went between the two calls is left to the next look at it.
                    let state = if private_page_is_ours(entry) { State::Writable } else { State::Readable };
                    let end = if huge(&run) { next } else { start.wrapping_add(PAGE_SIZE) };
                    push(runs, Run::new(start..end, state, run.size));
                })?;
                at = next;
            }
        }
        Ok(())
    }

    /// By reading `/proc/self/pagemap` alone.
    fn entries(&self, mapping: &Mapping, range: Range<Hva>, runs: &mut Vec<Run>) -> Result<(), Errno> {
        self.for_each_entry(range, |start, entry| {
            let state = if entry & ENTRY_PRESENT == 0 {
                State::Absent
            } else if mapping.write && (mapping.shared || private_page_is_ours(entry)) {
                State::Writable
            } else {
                State::Readable
            };
            push(runs, Run::new(start..start.wrapping_add(PAGE_SIZE), state, mapping.page_size));
        })
    }

    fn for_each_entry(&self, range: Range<Hva>, mut each: impl FnMut(Hva, u64)) -> Result<(), Errno> {
        let mut bytes = [0; AT_ONCE * 8];
        let mut at = range.start;
        while at < range.end {
            let pages = range.end.checked_offset_from(at).unwrap_or(0) / PAGE_SIZE;
            let wanted = usize::try_from(pages).unwrap_or(usize::MAX).min(AT_ONCE) * 8;
            let read = self
                .pagemap
                .read_at(&mut bytes[..wanted], at.raw() / PAGE_SIZE * 8)
                .map_err(|error| errno(&error))?;
            if read < 8 {
                return Err(Errno::IO);
            }
            for entry in bytes[..read].as_chunks().0 {
                each(at, u64::from_ne_bytes(*entry));
                at = at.wrapping_add(PAGE_SIZE);
            }
        }
        Ok(())
    }
}

/// Whether a present page of a private, writable mapping can be written without being copied.
const fn private_page_is_ours(entry: u64) -> bool {
    entry & (ENTRY_PRESENT | ENTRY_FILE | ENTRY_EXCLUSIVE) == ENTRY_PRESENT | ENTRY_EXCLUSIVE
}

/// Adds a run, to the last one if they agree.
fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last)
            if (last.state, last.size) == (run.state, run.size)
                && last.start.wrapping_add(last.pages * PAGE_SIZE) == run.start =>
        {
            last.pages += run.pages;
        }
        _ => runs.push(run),
    }
}
