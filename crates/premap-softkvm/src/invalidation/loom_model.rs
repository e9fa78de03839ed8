//! The protocol under every interleaving, on the real second-stage table.
//!
//! The host has one page behind guest page 0. Its frame is a number in a cell, which a change of the host moves on; a guest
//! that reaches memory through the table must find the frame that the host has at that moment.

use std::ops::Range;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use premap_address::{Gfn, Gpa, GpaRange, PAGE_SIZE, PageSize, Pfn};
use premap_mmu::{Attributes, Edges, Heap, Levels, Npt, PageTable, Permissions, Present};

use super::Invalidations;

/// Guest page 0, whose memory the host changes.
const PAGE: Range<Gfn> = Gfn::new(0)..Gfn::new(1);
/// Another, whose memory it changes too.
const OTHER: Range<Gfn> = Gfn::new(2)..Gfn::new(3);

struct Vm {
    invalidations: Invalidations,
    table: PageTable<Npt, Heap>,
    /// The frame that the host has behind the page.
    host: AtomicU64,
    /// Whether there is a slot with the page in it.
    slot: AtomicBool,
}

impl Vm {
    fn new() -> Arc<Self> {
        let table = PageTable::new(Heap, Levels::Four).expect("a frame");
        // The tables above exist; the leaf table does not, so that who maps and who unmaps need not meet at its lock.
        let next = Gpa::new(PageSize::Size2M.bytes());
        let all = Attributes::new(Permissions::ALL);
        let done = table.place(next, PageSize::Size2M, Pfn::new(512), all, Present::Keep, || true);
        assert!(done.stopped.is_none());
        drop(done);
        Arc::new(Self {
            invalidations: Invalidations::default(),
            table,
            host: AtomicU64::new(1),
            slot: AtomicBool::new(true),
        })
    }

    /// What a vCPU does that faults on the page, or maps it ahead: once, without trying again.
    fn fault(&self) {
        if !self.slot.load(Ordering::Acquire) {
            return;
        }
        let sequence = self.invalidations.snapshot();
        let frame = Pfn::new(self.host.load(Ordering::Acquire));
        let valid = || self.invalidations.allows(sequence, &PAGE);
        let all = Attributes::new(Permissions::ALL);
        let done =
            self.table.place(PAGE.start.address(), PageSize::Size4K, frame, all, Present::Rebuild, valid);
        done.flush.complete_by_waiting();
    }

    /// The guest's access: what the table leads to is what the host has, for as long as the access lasts.
    fn touch(&self) {
        let view = self.table.view();
        if let Ok(mapping) = view.access(PAGE.start.address(), premap_mmu::Access::Read) {
            let frame = mapping.translate(PAGE.start.address()).expect("a leaf of this page").frame();
            assert_eq!(frame.number(), self.host.load(Ordering::Acquire), "an access to a page that is gone");
        }
        drop(view);
    }

    /// What the MMU notifier does around a change of the page.
    fn change_host(&self) {
        self.invalidations.begin();
        if self.slot.load(Ordering::Acquire) {
            self.invalidations.add(PAGE);
            self.unmap(&PAGE);
        }
        self.host.fetch_add(1, Ordering::AcqRel);
        self.invalidations.end();
    }

    /// The same around a change of another page, which is not mapped.
    fn change_other(&self) {
        self.invalidations.begin();
        self.invalidations.add(OTHER);
        self.invalidations.end();
    }

    fn unmap(&self, pages: &Range<Gfn>) {
        let count = pages.end.number() - pages.start.number();
        let range = GpaRange::new(pages.start.address(), count * PAGE_SIZE);
        self.table.unmap(range, Edges::Whole).flush.complete_by_waiting();
    }

    fn check(&self) {
        if let Some(leaf) = self.table.walk(Gpa::new(0)) {
            let frame = leaf.translate(Gpa::new(0)).expect("a leaf of this page").frame();
            assert_eq!(frame.number(), self.host.load(Ordering::Acquire), "a stale mapping survived");
        }
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

/// Runs each on a thread of its own, and the first here.
fn together(vm: &Arc<Vm>, here: impl FnOnce(&Vm), others: &[fn(&Vm)]) {
    let others: Vec<_> = others
        .iter()
        .map(|&other| {
            let vm = Arc::clone(vm);
            thread::spawn(move || other(&vm))
        })
        .collect();
    here(vm);
    for other in others {
        other.join().expect("no panic");
    }
    vm.check();
}

#[test]
fn a_stale_answer_maps_nothing() {
    check(|| together(&Vm::new(), Vm::fault, &[Vm::change_host]));
}

#[test]
fn a_guest_never_reaches_a_page_that_is_gone() {
    check(|| {
        let vm = Vm::new();
        vm.fault();
        let guest = |vm: &Vm| {
            vm.touch();
            vm.fault();
            vm.touch();
        };
        together(&vm, guest, &[Vm::change_host]);
    });
}

#[test]
fn an_invalidation_that_ends_does_not_end_another() {
    check(|| together(&Vm::new(), Vm::fault, &[Vm::change_host, Vm::change_other]));
}

#[test]
fn a_slot_appears_only_where_no_invalidation_began_without_it() {
    check(|| {
        let vm = Vm::new();
        vm.slot.store(false, Ordering::Release);
        let publish = |vm: &Vm| {
            vm.invalidations.when_idle(|| vm.slot.store(true, Ordering::Release));
            vm.fault();
        };
        together(&vm, publish, &[Vm::change_host]);
    });
}
