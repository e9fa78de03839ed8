//! The MMU notifier: how a VM learns that the VMM is about to change the memory behind it.
//!
//! Linux tells its KVM by itself. A user-space KVM can't be told by the host's kernel, so whoever changes memory behind a
//! slot says so: `munmap`, `mprotect`, `mremap`, `madvise` with `MADV_DONTNEED`, a hole punched in a memfd or a shorter
//! file, and a `fork`. Touching memory, and making it present, needs no word: a copy that it makes lies at the same
//! host-virtual address, and so does the mapping. Who wants such copies to cost the guest a fault, as they do on Linux,
//! lets them be [observed](Notifier::observe).

use std::ops::Range;

use premap_address::{Hva, PAGE_SIZE, PageSize};

use crate::host::State;
use crate::machine::Machine;

/// The VM's ear for changes of host memory.
#[derive(Clone, Copy, Debug)]
pub struct Notifier<'vm> {
    machine: &'vm Machine,
}

/// A change of host memory that is under way; dropping it says that it is done.
///
/// Until then no page of it is mapped at the second stage: a guest that touches it waits, and so does a change of slots.
#[must_use = "dropping it ends the invalidation"]
#[derive(Debug)]
pub struct Invalidation<'vm> {
    machine: &'vm Machine,
}

impl<'vm> Notifier<'vm> {
    pub(crate) fn new(machine: &'vm Machine) -> Self {
        Self { machine }
    }

    /// Says that `memory` is about to change. When this returns, nothing of it is mapped at the second stage, and no vCPU
    /// is in the middle of an access to it: `invalidate_range_start`.
    pub fn begin(&self, memory: &Range<Hva>) -> Invalidation<'vm> {
        self.machine.begin_invalidation(memory);
        Invalidation { machine: self.machine }
    }

    /// Runs `change` while nothing of `memory` is mapped at the second stage.
    pub fn invalidate<R>(&self, memory: &Range<Hva>, change: impl FnOnce() -> R) -> R {
        let _under_way = self.begin(memory);
        change()
    }

    /// Runs `touch`, which reads, writes or populates `memory`, and unmaps what the host has changed meanwhile: pages that
    /// it copied, and huge pages that it split.
    pub fn observe<R>(&self, memory: &Range<Hva>, touch: impl FnOnce() -> R) -> R {
        // A huge page changes as a whole.
        let end = memory.end.checked_align_up(PageSize::Size2M).unwrap_or(memory.end);
        let whole = memory.start.align_down(PageSize::Size2M)..end;
        let before = self.machine.host.pages_of(&whole);
        let value = touch();
        let after = self.machine.host.pages_of(&whole);
        let mut changed: Option<Range<Hva>> = None;
        for ((page, before), (_, after)) in before.zip(after) {
            let was_present = matches!(before.0, State::Readable | State::Writable);
            if !was_present || before == after {
                continue;
            }
            let next = page.wrapping_add(PAGE_SIZE);
            changed = match changed.take() {
                Some(range) if range.end == page => Some(range.start..next),
                Some(range) => {
                    drop(self.begin(&range));
                    Some(page..next)
                }
                None => Some(page..next),
            };
        }
        if let Some(range) = changed {
            drop(self.begin(&range));
        }
        value
    }

    /// Says that the process forked, or lets KSM merge `memory`: its private pages are shared from here on, and a write
    /// must copy them. Later pre-faults ask about each page, which costs more.
    pub fn shared(&self, memory: &Range<Hva>) {
        self.machine.assume_shared_pages();
        self.invalidate(memory, || ());
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        self.machine.end_invalidation();
    }
}
