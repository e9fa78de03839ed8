//! Slots that are made, moved and deleted while they are in use.

use std::thread;
use std::time::Duration;

use premap::Gpa;
use premap_address_space::{AddressSpace, Exclusivity, State};
use premap_guest::{Access, Backing, GuestError, Kernel, Memory};
use premap_kvm::abi::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
};
use premap_kvm::{Errno, Vcpu};

use super::FEW;
use crate::fixture::{BASE, PAGE};
use crate::raw::{Arena, RawSlot, count, pre_fault, pre_fault_all, touch};
use crate::reach::pages_a_fault;
use crate::storm;

const PAGES: u64 = 64;
/// The slot that changes.
const SLOT: RawSlot = RawSlot { number: 0, flags: 0, gpa: BASE, pages: PAGES, from: 0 };
/// The same at its new place.
const MOVED: RawSlot = RawSlot { gpa: Gpa::new(BASE.raw() + PAGES * PAGE), ..SLOT };
/// Another that stays as it is.
const OTHER: RawSlot =
    RawSlot { number: 1, gpa: Gpa::new(BASE.raw() + 2 * PAGES * PAGE), from: PAGES, ..SLOT };

/// What becomes of the other slots' mappings.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Others {
    Zapped,
    Kept,
}

/// A machine with both slots, all mapped by a guest that reads them.
fn in_use<K: Kernel>(kernel: &K, others: Others) -> Arena<K> {
    let mut arena = Arena::new(kernel, 2 * PAGES, Backing::Anonymous);
    if others == Others::Kept {
        arena.keep_mappings();
    }
    arena.fill(0..2 * PAGES);
    for slot in [SLOT, OTHER] {
        arena.set(slot).expect("the slot can be made");
        assert_eq!(read(&mut arena, slot).0, sum(slot));
    }
    arena
}

/// What the guest reads of a slot, and the faults that it takes.
fn read<K: Kernel>(arena: &mut Arena<K>, slot: RawSlot) -> (u64, u64) {
    let vcpu = arena.vcpu(0);
    let before = count(vcpu, "pf_taken");
    let sum = touch(vcpu, slot.gpa, slot.pages, Access::Read).expect("the guest runs to its end");
    (sum, count(vcpu, "pf_taken") - before)
}

/// What the arena holds for a slot.
fn sum(slot: RawSlot) -> u64 {
    (slot.from..slot.from + slot.pages).map(|page| page + 1).sum()
}

fn check_other<K: Kernel>(arena: &mut Arena<K>, others: Others) {
    let (words, faults) = read(arena, OTHER);
    assert_eq!(words, sum(OTHER));
    let expected = match others {
        Others::Zapped => PAGES / pages_a_fault::<K>()..PAGES + FEW,
        Others::Kept => 0..1,
    };
    assert!(expected.contains(&faults), "{faults} faults in the other slot, whose mappings were {others:?}");
}

fn check_gone<K: Kernel>(arena: &mut Arena<K>) {
    let met = touch(arena.vcpu(0), SLOT.gpa, 1, Access::Read);
    assert!(matches!(met, Err(GuestError::Mmio { gpa, .. }) if gpa == SLOT.gpa), "{met:?}");
    assert_eq!(pre_fault(arena.vcpu(0), SLOT.gpa, 1).0, Err(Errno::NOENT));
}

/// A slot that moves in use is there with its content at the new place and no more at the old. The mappings of the others go
/// with its own, unless the quirk that has it so is switched off.
pub fn a_slot_that_moves_in_use_takes_its_memory_along<K: Kernel>(kernel: &K) {
    for others in [Others::Zapped, Others::Kept] {
        let mut arena = in_use(kernel, others);
        arena.set(MOVED).expect("a slot can be moved");
        check_other(&mut arena, others);
        check_gone(&mut arena);
        pre_fault_all(arena.vcpu(0), MOVED.gpa, PAGES);
        assert_eq!(read(&mut arena, MOVED), (sum(SLOT), 0));
    }
}

/// A slot that is deleted in use is gone at once, and can be made anew. For the others' mappings the same holds.
pub fn a_slot_that_is_deleted_in_use_is_gone_at_once<K: Kernel>(kernel: &K) {
    for others in [Others::Zapped, Others::Kept] {
        let mut arena = in_use(kernel, others);
        arena.set(RawSlot { pages: 0, ..SLOT }).expect("a slot can be deleted");
        check_other(&mut arena, others);
        check_gone(&mut arena);
        arena.set(SLOT).expect("the slot can be made again");
        pre_fault_all(arena.vcpu(0), SLOT.gpa, PAGES);
        assert_eq!(read(&mut arena, SLOT), (sum(SLOT), 0));
    }
}

/// Slots that can't be are refused, and those that are there stay: EEXIST for an overlap, EINVAL for the rest.
pub fn slots_that_cannot_be_are_refused<K: Kernel>(kernel: &K) {
    let arena = Arena::new(kernel, 2 * PAGES, Backing::Anonymous);
    arena.set(SLOT).expect("the slot can be made");
    let check = |what: &str, expected: Errno, change: &dyn Fn(&mut kvm_userspace_memory_region)| {
        let mut region = OTHER.region(arena.memory());
        change(&mut region);
        assert_eq!(arena.set_region(&region), Err(expected), "{what}");
    };
    for offset in [0, 1, PAGES - 1] {
        let overlapping = BASE.raw() + offset * PAGE;
        check("an overlap", Errno::EXIST, &|region| region.guest_phys_addr = overlapping);
    }
    check("an unknown flag", Errno::INVAL, &|region| region.flags = 1 << 31);
    check("private memory, and no word of whose", Errno::INVAL, &|region| region.flags = KVM_MEM_GUEST_MEMFD);
    check("an unaligned address", Errno::INVAL, &|region| region.guest_phys_addr += 1);
    check("an unaligned size", Errno::INVAL, &|region| region.memory_size -= 1);
    check("an unaligned host address", Errno::INVAL, &|region| {
        region.userspace_addr += 0x800;
        region.memory_size = PAGE;
    });
    check("a range that wraps", Errno::INVAL, &|region| region.guest_phys_addr = 0_u64.wrapping_sub(PAGE));
    check("a number too high", Errno::INVAL, &|region| region.slot = 0x7fff);
    check("a third address space", Errno::INVAL, &|region| region.slot = 2 << 16);
    check("the end of what is not there", Errno::INVAL, &|region| region.memory_size = 0);

    let change = |change: RawSlot| arena.set(change);
    assert_eq!(change(RawSlot { pages: PAGES / 2, ..SLOT }), Err(Errno::INVAL), "another size");
    assert_eq!(change(RawSlot { from: 1, ..SLOT }), Err(Errno::INVAL), "other memory");
    assert_eq!(
        change(RawSlot { flags: KVM_MEM_READONLY, ..SLOT }),
        Err(Errno::INVAL),
        "read-only from now on"
    );
    assert_eq!(change(RawSlot { flags: KVM_MEM_LOG_DIRTY_PAGES, ..SLOT }), Ok(()));
}

/// A slot is deleted and made again all the time while it is pre-faulted: each call comes back, by itself or, before Linux
/// 6.18, by a signal, and in the end the slot is mapped and its content right.
pub fn a_slot_made_again_under_a_pre_fault_is_mapped_in_the_end<K: Kernel>(kernel: &K) {
    const TIMES: usize = 20;
    let mut arena = in_use(kernel, Others::Zapped);
    let (set, vcpus) = arena.split();
    let vcpu = &mut vcpus[0];
    thread::scope(|scope| {
        let changes = scope.spawn(|| {
            for _ in 0..TIMES {
                set(RawSlot { pages: 0, ..SLOT }).expect("the slot can be deleted");
                set(SLOT).expect("the slot can be made again");
            }
        });
        while !changes.is_finished() {
            let call = || pre_fault(vcpu, SLOT.gpa, PAGES);
            let ((result, _), _) = storm::interrupted_after(Duration::from_millis(10), call);
            match result {
                // Linux before 6.15 spins on the root of before the deletion.
                Err(Errno::INTR) => vcpu.renew_root().expect("a root can be renewed"),
                Ok(()) | Err(Errno::NOENT | Errno::AGAIN) => {}
                Err(errno) => panic!("a pre-fault gave {errno}"),
            }
        }
    });
    drop(set);
    arena.vcpu(0).renew_root().expect("a root can be renewed");
    pre_fault_all(arena.vcpu(0), SLOT.gpa, PAGES);
    let (words, faults) = read(&mut arena, SLOT);
    assert_eq!(words, sum(SLOT));
    assert!(faults <= FEW, "{faults} faults on memory mapped ahead");
}

/// A slot that moves leaves a stale root. A pre-fault that spins on it, as before Linux 6.15, asks the host for its first page
/// again and again, and for no other.
pub fn a_stale_root_costs_the_host_one_page<K: Kernel>(kernel: &K) {
    const COUNT: u64 = 1024;
    let moved = RawSlot { gpa: Gpa::new(BASE.raw() + COUNT * PAGE), pages: COUNT, ..SLOT };
    let mut arena = Arena::new(kernel, COUNT, Backing::Anonymous);
    arena.set(RawSlot { gpa: BASE, ..moved }).expect("the slot can be made");
    assert_eq!(pre_fault(arena.vcpu(0), moved.gpa, 1).0, Err(Errno::NOENT), "the root is loaded");
    arena.set(moved).expect("a slot can be moved");
    let call = || pre_fault(arena.vcpu(0), moved.gpa, COUNT);
    let ((result, left), _) = storm::interrupted_after(Duration::from_millis(200), call);
    let present = present(arena.memory());
    match result {
        Err(Errno::INTR) => assert_eq!((left, present), (COUNT, 1)),
        other => assert_eq!((other, present), (Ok(()), COUNT - left), "the root was taken anew"),
    }
}

/// How many of the memory's pages the host has, zero pages too.
fn present(memory: &Memory) -> u64 {
    let host = AddressSpace::open().expect("/proc is mounted");
    let whole = memory.hva()..memory.hva().wrapping_add(memory.bytes());
    let runs = host.query_all(whole, Exclusivity::Assume).expect("the host can be asked");
    runs.iter().filter(|run| run.state != State::Absent).map(|run| run.pages).sum()
}
