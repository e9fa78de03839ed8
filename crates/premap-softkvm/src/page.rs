//! Getting one page of the host's, for somebody who waits for it.

use std::ops::Range;
use std::thread;

use premap_address::{Gfn, Hva, PAGE_SIZE, PageSize};
use premap_kvm::Errno;

use crate::host::{Exclusivity, Failure, Run, State, Touch, populate};
use crate::invalidation::Sequence;
use crate::machine::Machine;
use crate::signals::raise_poisoned;

/// What the host says of a page.
pub(crate) enum Page {
    /// This.
    Is(Run),
    /// It was made just now, by replacing another: start again.
    Replaced,
}

/// What to make of a page that a write would have to copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copies {
    /// The copy replaces a page that may be mapped.
    Replace,
    /// It was copied for this very write already, or nobody is to notice. A kernel whose records do not tell whose a page
    /// is must not make the guest fault for ever.
    Believed,
}

/// A page of the guest's that the host had present at a moment. Only an answer of the host makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PresentPage {
    gfn: Gfn,
    hva: Hva,
    touch: Touch,
    sequence: Sequence,
}

impl PresentPage {
    /// The page that is the run's first, asked about after `sequence` was taken.
    pub(crate) fn new(gfn: Gfn, run: &Run, sequence: Sequence) -> Self {
        let touch = if run.state == State::Writable { Touch::Write } else { Touch::Read };
        Self { gfn, hva: run.start, touch, sequence }
    }

    /// Where the page lies, if that still holds and it may be touched so.
    pub(crate) fn valid(&self, machine: &Machine, touch: Touch) -> Option<Hva> {
        let page = self.gfn..Gfn::new(self.gfn.number() + 1);
        let may = touch == Touch::Read || self.touch == Touch::Write;
        (may && machine.invalidations.allows(self.sequence, &page)).then_some(self.hva)
    }
}

impl Machine {
    /// Makes the page at `hva` present for this touch: KVM's `hva_to_pfn`.
    pub(crate) fn get_page(
        &self,
        hva: Hva,
        touch: Touch,
        copies: Copies,
        runs: &mut Vec<Run>,
    ) -> Result<Page, Errno> {
        let page = hva..hva.wrapping_add(PAGE_SIZE);
        loop {
            self.host.query(page.clone(), Exclusivity::Ask, runs)?;
            let run = runs.first().copied().ok_or(Errno::FAULT)?;
            let got = match (run.state, touch) {
                (State::NoAccess, _) => return Err(Errno::FAULT),
                (State::Writable, _) | (State::Readable, Touch::Read) => return Ok(Page::Is(run)),
                (State::Absent, _) => populate(page.clone(), touch).map(|()| None),
                (State::Readable, Touch::Write) if !self.host.may_write(hva)? => return Err(Errno::FAULT),
                (State::Readable, Touch::Write) if copies == Copies::Believed => {
                    let writable = Run { state: State::Writable, ..run };
                    populate(page.clone(), touch).map(|()| Some(Page::Is(writable)))
                }
                (State::Readable, Touch::Write) => {
                    self.begin_invalidation(&replaced(&page, run.size));
                    let copied = populate(page.clone(), touch);
                    self.end_invalidation();
                    copied.map(|()| Some(Page::Replaced))
                }
            };
            match got {
                Ok(Some(page)) => return Ok(page),
                Ok(None) => {}
                Err(Failure::Again | Failure::Interrupted) => thread::yield_now(),
                Err(Failure::BadAddress) => return Err(Errno::FAULT),
                Err(Failure::Poisoned) => {
                    // The signal is what the VMM acts on; KVM_RUN itself then ends with EINTR.
                    raise_poisoned(hva);
                    return Err(Errno::INTR);
                }
            }
        }
    }
}

/// What a copy takes the place of: all of a huge page that is shared, since the host splits or replaces it.
fn replaced(page: &Range<Hva>, size: PageSize) -> Range<Hva> {
    let start = page.start.align_down(size);
    start..start.wrapping_add(size.bytes())
}
