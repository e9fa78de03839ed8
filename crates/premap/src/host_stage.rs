//! The host stage: makes a chunk present in this process before KVM is asked to map it.
//!
//! `MADV_POPULATE_WRITE` (or `_READ`) on a few MiB at a time, so that a stop or a deadline is heard soon. It changes no
//! content, gives an errno where a touch would give SIGBUS or SIGSEGV, and says nothing of how far it got; so where it
//! fails, halves are tried, down to the page, and only the pages that really can't be had are reported. A second pass over
//! present pages costs next to nothing.
//!
//! Where one page after another fails for the same reason, the mapping is looked at (`mappings`): a full file system, a
//! pool without access or the end of a file is lost at once, and named, instead of page by page.
// UNSAFETY: madvise on memory that is described by address only.
#![expect(unsafe_code, reason = "madvise takes a raw pointer")]

use std::time::{Duration, Instant};

use premap_address::{GpaRange, PAGE_SIZE};
use premap_kvm::Errno;
use rustix::mm::{Advice, madvise};

use crate::clock::Clock;
use crate::control::Control;
use crate::forgotten::Standing;
use crate::gate::Pass;
use crate::mappings::{Mappings, Outlook};
use crate::memory::{Backing, Touch};
use crate::patience::Patience;
use crate::plan::Chunk;
use crate::report::{Reason, Stage};
use crate::tally::{Numbered, Tally};

/// How much one call populates at most: 5 ms at 1 GiB/s, for which a stop or a deadline may have to wait.
const CALL: u64 = 4 << 20;
/// How many pages in a row may fail alike before it is asked why. A hugetlb page is reason enough by itself.
const ALIKE: u64 = 8;

/// What the host stage made of a chunk; the ranges are in ascending order and together they are the chunk.
#[derive(Debug, Default)]
pub(crate) struct Populated {
    pub(crate) present: Vec<GpaRange>,
    pub(crate) absent: Vec<(GpaRange, Reason)>,
}

impl Populated {
    fn add_present(&mut self, range: GpaRange) {
        match self.present.last_mut().and_then(|last| Some((last.join(range)?, last))) {
            Some((joined, last)) => *last = joined,
            None => self.present.push(range),
        }
    }
}

/// Pages in a row that failed alike.
#[derive(Clone, Copy, Debug)]
struct Failed {
    range: GpaRange,
    errno: Errno,
    pages: u64,
}

/// Why a chunk is not present as a whole.
enum Shortfall {
    /// None of it will be.
    Lost(Reason),
    /// The kernel refused this page.
    Failed(Errno),
    /// It is worth trying in two parts.
    Cut((Chunk, Chunk)),
}

/// Makes pages of this process present.
pub(crate) struct HostStage<'a> {
    pub(crate) control: &'a Control,
    pub(crate) clock: &'a Clock,
    pub(crate) mappings: &'a Mappings,
    pub(crate) patience: Duration,
}

impl HostStage<'_> {
    /// Makes the chunk present as far as that can be, and gives what of it is, and what is not.
    pub(crate) fn run(&self, Numbered { place, chunk }: Numbered, tally: &mut Tally) -> Populated {
        let mut outcome = Populated::default();
        let mut todo = vec![chunk];
        let mut alike: Option<Failed> = None;
        let lose = |outcome: &mut Populated, tally: &mut Tally, range: GpaRange, reason| {
            tally.lost(place, Stage::Host, range, reason);
            outcome.absent.push((range, reason));
        };
        while let Some(chunk) = todo.pop() {
            let result = self.populate(chunk, tally);
            if let Err(Shortfall::Failed(errno)) = result {
                let failed =
                    alike.take().map_or(Ok(Failed::new(chunk, errno)), |alike| alike.and(chunk, errno));
                let failed = failed.unwrap_or_else(|(before, failed)| {
                    lose(&mut outcome, tally, before.range, Reason::Errno(before.errno));
                    failed
                });
                match failed.is_pattern(&chunk).then(|| todo.last()).flatten() {
                    Some(next) => {
                        lose(
                            &mut outcome,
                            tally,
                            failed.range,
                            self.mappings.blame(&failed.range, next, errno),
                        );
                    }
                    None => alike = Some(failed),
                }
                continue;
            }
            if let (Some(failed), false) = (alike, matches!(result, Err(Shortfall::Cut(_)))) {
                lose(&mut outcome, tally, failed.range, Reason::Errno(failed.errno));
                alike = None;
            }
            match result {
                Ok(()) => {
                    tally.mapped(Stage::Host, chunk.range.bytes());
                    outcome.add_present(chunk.range);
                }
                Err(Shortfall::Cut((first, second))) => todo.extend([second, first]),
                Err(Shortfall::Lost(reason)) => lose(&mut outcome, tally, chunk.range, reason),
                Err(Shortfall::Failed(_)) => {}
            }
        }
        if let Some(failed) = alike {
            lose(&mut outcome, tally, failed.range, Reason::Errno(failed.errno));
        }
        outcome
    }

    fn populate(&self, chunk: Chunk, tally: &mut Tally) -> Result<(), Shortfall> {
        let mut patience = Patience::new(self.patience);
        loop {
            if let Some(why) = self.control.ended() {
                return Err(Shortfall::Lost(why));
            }
            let came = Instant::now();
            let pass = self.control.enter(None).map_err(Shortfall::Lost)?;
            patience.excuse(came.elapsed());
            let changes = pass.changes();
            if self.mappings.are_stale(changes) {
                // A gate that is closed all the time keeps the look from ever being new enough.
                drop(pass);
                self.mappings.read_anew(changes);
                if patience.is_over() {
                    return Err(Shortfall::Lost(Reason::Busy));
                }
                continue;
            }
            match self.outlook(&chunk, &pass) {
                Outlook::Lost(bytes, reason) => {
                    return Err(chunk.split_at(bytes).map_or(Shortfall::Lost(reason), Shortfall::Cut));
                }
                Outlook::Fine(bytes) => {
                    let unit = chunk.backing.unit();
                    let call = bytes.min(CALL.max(unit)).max(unit);
                    if let Some(cut) = chunk.split_at(call / unit * unit) {
                        return Err(Shortfall::Cut(cut));
                    }
                }
            }
            if chunk.backing == Backing::GuestMemfd {
                return Ok(());
            }
            tally.called(Stage::Host);
            let result = self.clock.time(Stage::Host, || advise(chunk));
            drop(pass);
            match result {
                Ok(()) => return Ok(()),
                Err(Errno::INTR | Errno::AGAIN) => {
                    patience.back_off(self.control).map_err(Shortfall::Lost)?
                }
                Err(errno) => {
                    return Err(chunk.halves().map_or(Shortfall::Failed(errno), Shortfall::Cut));
                }
            }
        }
    }

    /// What is known of the chunk's first bytes while inside the gate.
    fn outlook(&self, chunk: &Chunk, pass: &Pass<'_>) -> Outlook {
        match pass.standing(chunk.range) {
            Standing::Gone(bytes) => Outlook::Lost(bytes, Reason::Forgotten),
            Standing::There(there) => match self.mappings.outlook(chunk) {
                Outlook::Fine(bytes) => Outlook::Fine(bytes.min(there)),
                Outlook::Lost(bytes, reason) => Outlook::Lost(bytes.min(there), reason),
            },
        }
    }
}

impl Failed {
    fn new(page: Chunk, errno: Errno) -> Self {
        Self { range: page.range, errno, pages: 1 }
    }

    /// The same with one page more, or, where it is no continuation, both apart.
    fn and(self, page: Chunk, errno: Errno) -> Result<Self, (Self, Self)> {
        match self.range.join(page.range).filter(|_| errno == self.errno) {
            Some(range) => Ok(Self { range, errno, pages: self.pages + 1 }),
            None => Err((self, Self::new(page, errno))),
        }
    }

    /// Whether what lies behind will probably fail too. A broken page says nothing of its neighbours.
    fn is_pattern(&self, page: &Chunk) -> bool {
        let enough = if page.backing.unit() > PAGE_SIZE { 1 } else { ALIKE };
        self.pages >= enough && self.errno != Errno::HWPOISON
    }
}

fn advise(chunk: Chunk) -> Result<(), Errno> {
    let advice = match chunk.touch {
        Touch::Read => Advice::LinuxPopulateRead,
        Touch::Write => Advice::LinuxPopulateWrite,
    };
    let (Ok(host), Ok(len)) = (usize::try_from(chunk.host.raw()), usize::try_from(chunk.range.bytes()))
    else {
        return Err(Errno::INVAL);
    };
    // SAFETY: populating changes no content and unmaps nothing; it only makes present what the address space already
    // maps there, and gives an errno for what it does not, so it is harmless whatever the address.
    unsafe { madvise(std::ptr::with_exposed_provenance_mut(host), len, advice) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Stages;
    use crate::gate::Gate;
    use crate::memory::Region;
    use crate::plan::Plan;
    use premap_address::{Gpa, Hva};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

    const PAGES: u64 = 16;

    fn bytes(pages: u64) -> usize {
        usize::try_from(pages * PAGE_SIZE).unwrap()
    }

    /// Populates 16 pages of which some were spoilt, and gives the pages that failed, each with its errno.
    fn check(spoil: impl Fn(u64, *mut std::ffi::c_void), bad: &[u64], touch: Touch, expected: Errno) {
        let len = bytes(PAGES);
        let base = mapped_apart(len);
        for page in bad {
            spoil(*page, base.wrapping_byte_add(bytes(*page)));
        }
        let range = GpaRange::new(Gpa::new(0), PAGES * PAGE_SIZE);
        let host = Hva::new(base.expose_provenance() as u64);
        let plan = Plan::new([Region { range, host, backing: Backing::Anonymous, touch }]).unwrap();
        let control = Control::new(&plan, None, None, &Gate::new());
        let clock = Clock::new();
        let mappings = Mappings::read(Stages::Host, 0);
        let patience = Duration::from_secs(1);
        let stage = HostStage { control: &control, clock: &clock, mappings: &mappings, patience };
        let mut tally = Tally::default();
        let chunk = Chunk::whole(plan.regions()[0]);
        let populated = stage.run(Numbered { place: 0, chunk }, &mut tally);
        let mut report = crate::Report { asked: plan.bytes(), ..Default::default() };
        tally.write(&mut report);
        let failed: Vec<_> = report
            .unmapped
            .iter()
            .flat_map(|lost| (0..PAGES).filter(|page| lost.range.contains(Gpa::new(page * PAGE_SIZE))))
            .collect();
        assert_eq!(failed, bad);
        assert!(report.unmapped.iter().all(|lost| lost.reason == Reason::Errno(expected)), "{report:?}");
        assert_eq!(report.host.bytes(), plan.bytes());
        assert_eq!(populated.present.iter().map(|range| range.bytes()).sum::<u64>(), report.host.mapped);
        // SAFETY: the mapping is the test's own and nothing refers to it any more.
        unsafe { munmap(base, len) }.unwrap();
    }

    /// Memory where the kernel, which gives addresses out from the top, puts no mapping of another thread into its holes.
    fn mapped_apart(len: usize) -> *mut std::ffi::c_void {
        static NEXT: AtomicUsize = AtomicUsize::new(1 << 36);
        let at = std::ptr::without_provenance_mut(NEXT.fetch_add(2 * len, Ordering::Relaxed));
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: a new mapping, made only where there is none.
        unsafe { mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags) }.unwrap()
    }

    fn unmap(_: u64, page: *mut std::ffi::c_void) {
        // SAFETY: the page belongs to the test's own mapping, which nothing refers to.
        unsafe { munmap(page, bytes(1)) }.unwrap();
    }

    fn protect(flags: MprotectFlags) -> impl Fn(u64, *mut std::ffi::c_void) {
        // SAFETY: the page belongs to the test's own mapping, which nothing refers to.
        move |_, page| unsafe { mprotect(page, bytes(1), flags) }.unwrap()
    }

    #[test]
    fn only_pages_that_cannot_be_had_fail() {
        check(unmap, &[], Touch::Write, Errno::NOMEM);
        check(unmap, &[5], Touch::Write, Errno::NOMEM);
        check(unmap, &[0, 7, 8, 15], Touch::Read, Errno::NOMEM);
        check(protect(MprotectFlags::empty()), &[3, 4], Touch::Read, Errno::INVAL);
    }

    #[test]
    fn what_was_forgotten_is_neither_touched_nor_refused() {
        let range = GpaRange::new(Gpa::new(0), PAGES * PAGE_SIZE);
        // Nothing is mapped at this address: a call about it would fail.
        let host = Hva::new(PAGE_SIZE);
        let region = Region { range, host, backing: Backing::Anonymous, touch: Touch::Write };
        let plan = Plan::new([region]).unwrap();
        let gate = Gate::new();
        let control = Control::new(&plan, None, None, &gate);
        let (head, tail) = range.split_at(5 * PAGE_SIZE).unwrap();
        let guard = gate.close();
        guard.forget(tail);
        guard.forget(head);
        drop(guard);
        let clock = Clock::new();
        let mappings = Mappings::read(Stages::Host, 0);
        let patience = Duration::from_secs(1);
        let stage = HostStage { control: &control, clock: &clock, mappings: &mappings, patience };
        let mut tally = Tally::default();
        let chunk = Chunk::whole(plan.regions()[0]);
        let populated = stage.run(Numbered { place: 0, chunk }, &mut tally);
        assert!(populated.absent.iter().all(|(_, why)| *why == Reason::Forgotten));
        let mut report = crate::Report::default();
        tally.write(&mut report);
        assert_eq!((report.host.skipped, report.host.calls), (range.bytes(), 0));
    }

    #[test]
    fn read_only_memory_can_be_read_but_not_written() {
        check(protect(MprotectFlags::READ), &[2], Touch::Write, Errno::INVAL);
        check(protect(MprotectFlags::READ), &[], Touch::Read, Errno::INVAL);
    }
}
