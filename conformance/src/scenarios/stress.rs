//! What the kernel's own tests put KVM through, in our words.

use premap::Gpa;
use premap_guest::{Access, Backing, Kernel, MappedPages};
use premap_kvm::{Errno, Vcpu};

use super::FEW;
use crate::fixture::{BASE, Fixture, PAGE};
use crate::raw::{Arena, RawSlot, count, pre_fault, pre_fault_all, touch};
use crate::reach::pages_a_fault;

/// 2 MiB and a page.
const PAGES: u64 = 513;
/// Where the slot lies below an end: aligned for a huge page, with room behind it.
const BELOW: u64 = 4 << 20;

/// A slot of 2 MiB and a page: the first 2 MiB leave nothing, the last page and one more leave that one, and what is past the
/// end is ENOENT. Then the guest reads every page. So it is as far up as the guest reaches, and, but for the guest, below the
/// last address that KVM allows.
pub fn pre_faulting_ends_with_the_slot_near_the_top_of_memory<K: Kernel>(kernel: &K) {
    for backing in [Backing::Anonymous, Backing::TransparentHuge] {
        let mut arena = Arena::new(kernel, PAGES, backing);
        arena.fill(0..PAGES);
        let slot = RawSlot { number: 0, flags: 0, gpa: Gpa::new((1 << 39) - BELOW), pages: PAGES, from: 0 };
        arena.set(slot).expect("the slot can be made");
        check_ends(&mut arena, slot.gpa);
        let vcpu = arena.vcpu(0);
        let before = count(vcpu, "pf_taken");
        let sum = touch(vcpu, slot.gpa, PAGES, Access::Read).expect("the guest runs to its end");
        assert_eq!(sum, (1..=PAGES).sum::<u64>());
        let faults = count(vcpu, "pf_taken") - before;
        assert!(faults <= FEW, "{faults} faults on memory mapped ahead");

        let highest = (40..=52).rev().map(|bits| Gpa::new((1 << bits) - BELOW));
        let gpa = highest.into_iter().find(|gpa| arena.set(RawSlot { number: 1, gpa: *gpa, ..slot }).is_ok());
        check_ends(&mut arena, gpa.expect("40 bits can be addressed"));
    }
}

fn check_ends<K: Kernel>(arena: &mut Arena<K>, gpa: Gpa) {
    let (vcpu, at) = (arena.vcpu(0), |page| gpa.wrapping_add(page * PAGE));
    pre_fault_all(vcpu, gpa, PAGES - 1);
    assert_eq!(pre_fault(vcpu, at(PAGES - 1), 2), (Ok(()), 1));
    assert_eq!(pre_fault(vcpu, at(PAGES), 1), (Err(Errno::NOENT), 1));
}

/// Four vCPUs write all memory, give up their roots, and write it again: the mappings outlive that. Once the slot is deleted
/// and made again they don't.
pub fn vcpus_that_renew_their_roots_find_their_mappings<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 4096;
    let mut fixture = Fixture::new(kernel, 4, PAGES, Backing::Anonymous);
    let first = fixture.write_all().faults;
    assert!(first >= PAGES, "{first} faults on memory that was not mapped");
    for round in 0..3 {
        for vcpu in &mut *fixture.machine.lend().vcpus {
            vcpu.renew_root().expect("a root can be renewed");
        }
        let again = fixture.write_all().faults;
        assert!(again <= FEW, "{again} faults in round {round}");
    }
    let memory = fixture.machine.slots().remove(fixture.slot).expect("the slot can be removed");
    fixture.slot =
        fixture.machine.slots().add(BASE, memory, Default::default()).expect("the slot can be made");
    let anew = fixture.write_all().faults;
    assert!(anew >= PAGES / pages_a_fault::<K>(), "{anew} faults after the mappings were taken away");
}

/// A pre-fault is no fault: of the statistics only the pages mapped tell of it.
pub fn a_pre_fault_counts_pages_and_no_faults<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 64;
    let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
    (0..PAGES).for_each(|page| fixture.memory().write_word(page * PAGE, page));
    let mapped = |fixture: &Fixture<K>| fixture.machine.mapped().expect("pages are counted");
    let before = mapped(&fixture);
    for _ in 0..2 {
        let vcpu = &mut fixture.machine.lend().vcpus[0];
        pre_fault_all(vcpu, BASE, PAGES);
        for name in ["pf_taken", "pf_fixed", "pf_spurious", "pf_emulate", "pf_fast", "exits"] {
            assert_eq!(count(vcpu, name), 0, "{name}");
        }
        let expected = MappedPages { pages_4k: before.pages_4k + PAGES, ..before };
        assert_eq!(mapped(&fixture), expected);
    }
}
