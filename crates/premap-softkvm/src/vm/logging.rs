//! Dirty logging by write protection, as KVM does it on AMD: a write to a protected page faults, and the fault marks it.
//!
//! Turned on, huge mappings are split at once (`eager_page_split`) and every mapping is protected. Turned off, small
//! mappings of what is huge on the host become huge again: in 6.12 by being taken away, later in place. The shadow MMU here has
//! no huge mappings, so there is nothing to split and nothing to make huge.

use premap_address::{Gfn, PAGE_SIZE, PageSize};
use premap_kvm::Errno;
use premap_mmu::Present;

use crate::host::{Run, State};
use crate::machine::Machine;
use crate::memslots::{Slot, SlotId};
use crate::profile::LoggingOff;
use crate::role::Spaces;

/// Pages that the host is asked about at once.
const WINDOW: u64 = 4096;

impl Machine {
    /// Gives the slot's dirty bitmap, and leaves it clear and its pages protected.
    pub(super) fn dirty_log(&self, slot: u32, bitmap: &mut [u64]) -> Result<(), Errno> {
        let id = SlotId::parse(slot).ok_or(Errno::INVAL)?;
        let _changing = self.slots.lock();
        let slots = self.slots.current();
        let slot = slots.get(id).ok_or(Errno::NOENT)?;
        let log = slot.dirty.as_ref().ok_or(Errno::NOENT)?;
        // Linux has only a pointer and writes to its end or fails; a slice tells how long it is.
        let words = bitmap.get_mut(..log.len()).ok_or(Errno::FAULT)?;
        for (index, word) in words.iter_mut().enumerate() {
            *word = log.take(index);
            if *word != 0 {
                let first = slot.base.number() + index as u64 * 64;
                let (low, high) = (u64::from(word.trailing_zeros()), 64 - u64::from(word.leading_zeros()));
                // Pages between two dirty ones are protected as well or again; that costs a fault at most.
                let pages = Gfn::new(first + low)..Gfn::new(first + high);
                self.write_protect(Spaces::One(id.space), &pages);
            }
        }
        Ok(())
    }

    pub(super) fn logging_began(&self, slot: &Slot) {
        let pages = slot.base..slot.end();
        let space = Spaces::One(slot.id.space);
        self.roots.split(space, &pages);
        self.write_protect(space, &pages);
    }

    pub(super) fn logging_ended(&self, slot: &Slot) {
        let mut runs = Vec::new();
        let mut gfn = slot.base;
        while gfn < slot.end() {
            let pages = WINDOW.min(slot.end().number() - gfn.number());
            let hva = slot.hva(gfn);
            let sequence = self.invalidations.snapshot();
            let memory = hva..hva.wrapping_add(pages * PAGE_SIZE);
            if self.host.query(memory, self.exclusivity(), &mut runs).is_err() {
                return;
            }
            for run in &runs {
                let end = Gfn::new(gfn.number() + run.pages.max(1));
                if run.size > PageSize::Size4K && matches!(run.state, State::Readable | State::Writable) {
                    self.make_huge(slot, gfn, end, run, sequence);
                }
                gfn = end;
            }
        }
    }

    /// Sees to it that these pages, huge on the host, are not mapped by small mappings any more.
    fn make_huge(
        &self,
        slot: &Slot,
        from: Gfn,
        end: Gfn,
        run: &Run,
        sequence: crate::invalidation::Sequence,
    ) {
        let mut gfn = from;
        while gfn < end {
            let size = run.size.min(self.largest(slot, gfn));
            let first = gfn.align_down(size);
            let pages = first..Gfn::new(first.number() + size.pages());
            if size > PageSize::Size4K {
                let space = Spaces::One(slot.id.space);
                self.roots.regrow(space, &pages, size, self.rules().logging_off, || {
                    self.invalidations.allows(sequence, &pages) && !self.shadow.mmu.tracks(pages.clone())
                });
            }
            gfn = pages.end;
        }
    }
}

impl crate::roots::Roots {
    /// Splits every huge mapping of these pages into small ones, also those that can't be written, such as the zero page's.
    fn split(&self, spaces: Spaces, pages: &std::ops::Range<Gfn>) {
        self.change(spaces, pages, |table, range| table.split(range, PageSize::Size4K));
    }

    /// Takes the small mappings of a huge page away, or makes one of them.
    fn regrow(
        &self,
        spaces: Spaces,
        pages: &std::ops::Range<Gfn>,
        size: PageSize,
        how: LoggingOff,
        valid: impl Fn() -> bool,
    ) {
        for root in self.list().into_iter().filter(|root| spaces.have(root.role.space)) {
            let present = |gfn: &Gfn| root.table.walk(gfn.address());
            let small =
                (pages.start.number()..pages.end.number()).map(Gfn::new).find_map(|gfn| present(&gfn));
            let Some(small) = small.filter(|mapping| mapping.page_size < size) else { continue };
            match how {
                LoggingOff::Zaps => self.unmap(spaces, pages),
                LoggingOff::Recovers => {
                    // A small mapping's frame tells the huge one's: the addresses are congruent in such a slot.
                    let pfn = small.pfn.align_down(size);
                    let done = root.table.place(
                        pages.start.address(),
                        size,
                        pfn,
                        small.attributes,
                        Present::Collapse,
                        || valid() && !root.is_obsolete(),
                    );
                    done.flush.complete_by_waiting();
                }
            }
        }
    }
}
