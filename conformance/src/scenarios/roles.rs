//! What a vCPU is about when it pre-faults decides which root is filled, and whether it can be.

use premap_guest::{Access, Backing, Guest, Kernel, Mode, word_of};
use premap_kvm::Errno;

use super::FEW;
use crate::fixture::{BASE, PAGE};
use crate::raw::{Arena, RawSlot, can_enter, count, pre_fault, pre_fault_all, touch};
use crate::reach::pages_a_fault;

const PAGES: u64 = 64;
const SLOT: RawSlot = RawSlot { number: 0, flags: 0, gpa: BASE, pages: PAGES, from: 0 };
/// The same place in the address space of system management mode, in other memory.
const SMM_SLOT: RawSlot = RawSlot { number: 1 << 16, from: PAGES, ..SLOT };

/// A machine with [`SLOT`], all of its memory present and writable on the host.
fn arena<K: Kernel>(kernel: &K) -> Arena<K> {
    let arena = Arena::new(kernel, 2 * PAGES, Backing::Anonymous);
    arena.set(SLOT).expect("the slot can be made");
    arena.fill(0..2 * PAGES);
    arena
}

/// Lets the guest write every page of the slot, checks that it did, in the arena from page `from` on, and gives the faults.
fn write_all<K: Kernel>(arena: &mut Arena<K>, from: u64) -> u64 {
    arena.fill(0..2 * PAGES);
    let vcpu = arena.vcpu(0);
    let before = count(vcpu, "pf_taken");
    touch(vcpu, BASE, PAGES, Access::Write).expect("the guest runs to its end");
    let faults = count(vcpu, "pf_taken") - before;
    for page in 0..2 * PAGES {
        let expected = if (from..from + PAGES).contains(&page) { word_of(page - from) } else { page + 1 };
        assert_eq!(arena.memory().read_word(page * PAGE), expected, "page {page}");
    }
    faults
}

/// Checks that the mode that the first vCPU is in has a root that no other mode uses, and that it stays when the mode is left. The
/// mode's memory is in the arena from page `from` on.
fn check_own_root<K: Kernel>(arena: &mut Arena<K>, mode: Mode, from: u64) {
    pre_fault_all(arena.vcpu(0), BASE, PAGES);
    let inside = write_all(arena, from);
    arena.vcpu(0).enter(Mode::Paging).expect("the mode can be left");
    let outside = write_all(arena, 0);
    arena.vcpu(0).enter(mode).expect("the mode can be entered again");
    let again = write_all(arena, from);
    assert!(inside <= FEW && again <= FEW, "{inside} and {again} faults on memory mapped ahead");
    assert!(outside >= PAGES / pages_a_fault::<K>(), "{outside} faults: the other root was filled");
}

/// A vCPU whose paging is off, and which never ran, fills the root that a vCPU with paging uses.
pub fn paging_off_fills_the_root_that_paging_uses<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    if can_enter::<K>(arena.vcpu(1), Mode::PagingOff) {
        pre_fault_all(arena.vcpu(1), BASE, PAGES);
        let faults = write_all(&mut arena, 0);
        assert!(faults <= FEW, "{faults} faults on memory mapped ahead");
    }
}

/// A vCPU in system management mode sees address space 1: no memory is ENOENT there, and what it maps is mapped for that mode
/// alone, and still is when the vCPU comes back to it.
pub fn system_management_has_slots_and_a_root_of_its_own<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    if !can_enter::<K>(arena.vcpu(0), Mode::SystemManagement) {
        return;
    }
    assert_eq!(pre_fault(arena.vcpu(0), BASE, PAGES), (Err(Errno::NOENT), PAGES));
    arena.set(SMM_SLOT).expect("the slot can be made");
    check_own_root(&mut arena, Mode::SystemManagement, PAGES);
}

/// While an L2 guest runs under an L1 with nested paging, pre-faulting is not to be had; the guest runs, and once it is left
/// pre-faulting works.
pub fn guest_mode_with_nested_paging_is_refused<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    if !can_enter::<K>(arena.vcpu(0), Mode::NestedPaging) {
        return;
    }
    assert_eq!(pre_fault(arena.vcpu(0), BASE, PAGES), (Err(Errno::OPNOTSUPP), PAGES));
    let faults = write_all(&mut arena, 0);
    // Linux maps up to eight pages of a shadowed table a fault.
    assert!(faults >= PAGES / 8, "{faults} faults: something was mapped");
    assert_eq!(pre_fault(arena.vcpu(0), BASE, PAGES), (Err(Errno::OPNOTSUPP), PAGES));
    arena.vcpu(0).enter(Mode::Paging).expect("the mode can be left");
    pre_fault_all(arena.vcpu(0), BASE, PAGES);
    let faults = write_all(&mut arena, 0);
    assert!(faults <= FEW, "{faults} faults on memory mapped ahead");
}

/// While an L2 guest runs under an L1 with shadow paging, pre-faulting works, and fills a root that is the L2's alone.
pub fn guest_mode_with_shadow_paging_has_a_root_of_its_own<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    if !can_enter::<K>(arena.vcpu(0), Mode::NestedShadow) {
        return;
    }
    check_own_root(&mut arena, Mode::NestedShadow, 0);
}

/// From any mode a vCPU can go into any other; memory is the same in all of them but system management mode.
pub fn every_mode_leads_to_every_other<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    arena.set(RawSlot { from: 0, ..SMM_SLOT }).expect("the slot can be made");
    for from in Mode::ALL {
        for to in Mode::ALL {
            if !can_enter::<K>(arena.vcpu(0), from) || !can_enter::<K>(arena.vcpu(0), to) {
                return;
            }
            if to != Mode::PagingOff {
                write_all(&mut arena, 0);
            }
        }
    }
}
