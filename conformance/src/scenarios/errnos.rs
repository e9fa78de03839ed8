//! What a pre-fault that does nothing says, and that it leaves the range as it was.

use std::time::Duration;

use premap::Gpa;
use premap_guest::{Access, Backing, GuestError, Kernel};
use premap_kvm::abi::{kvm_pre_fault_memory, kvm_userspace_memory_region};
use premap_kvm::{Errno, Vcpu};

use crate::fixture::{BASE, PAGE, pages};
use crate::missing::Missing;
use crate::raw::{Arena, NOWHERE, RawSlot, count, pre_fault, pre_fault_all, touch};
use crate::{child, reach, storm};

const PAGES: u64 = 64;
const SLOT: RawSlot = RawSlot { number: 0, flags: 0, gpa: BASE, pages: PAGES, from: 0 };

fn arena<K: Kernel>(kernel: &K) -> Arena<K> {
    let arena = Arena::new(kernel, PAGES, Backing::Anonymous);
    arena.set(SLOT).expect("the slot can be made");
    arena
}

fn at(page: u64) -> Gpa {
    BASE.wrapping_add(page * PAGE)
}

/// Flags, an unaligned, empty or wrapping range: EINVAL, also where there is no slot, and the range stays. Padding is not
/// looked at.
pub fn bad_arguments_are_refused_before_anything_is_looked_up<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    let (slot, hole, last) = (BASE.raw(), at(PAGES).raw(), 0_u64.wrapping_sub(PAGE));
    for (gpa, size, flags) in [
        (slot, PAGE, 1),
        (slot, PAGE, 1 << 63),
        (slot + 1, PAGE + 1, 1),
        (slot + 1, PAGE, 0),
        (slot, PAGE + 1, 0),
        (slot, 0, 0),
        (hole, PAGE, 1),
        (hole, 0, 0),
        (last, PAGE, 0),
        (last, 2 * PAGE, 0),
    ] {
        let mut range = kvm_pre_fault_memory { gpa, size, flags, padding: [7; 5] };
        let result = arena.vcpu(0).pre_fault_memory(&mut range);
        assert_eq!(result, Err(Errno::INVAL), "{size:#x} bytes at {gpa:#x}, flags {flags:#x}");
        assert_eq!((range.gpa, range.size, range.flags), (gpa, size, flags));
    }
    let mut range = kvm_pre_fault_memory { gpa: slot, size: PAGE, flags: 0, padding: [7; 5] };
    assert_eq!(arena.vcpu(0).pre_fault_memory(&mut range), Ok(()));
    assert_eq!((range.gpa, range.size), (slot + PAGE, 0));
}

/// Where there is no slot: ENOENT. KVM notes that there is nothing (`pf_mmio_spte_created`), and the guest's own access then
/// takes no fault to learn it.
pub fn no_slot_is_enoent_and_noted_as_a_device<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    touch(arena.vcpu(0), BASE, 1, Access::Read).expect("the guest runs to its end");
    let vcpu = arena.vcpu(0);
    let counts = |vcpu: &K::Vcpu| (count(vcpu, "pf_mmio_spte_created"), count(vcpu, "pf_taken"));
    let (noted, taken) = counts(vcpu);
    assert_eq!(pre_fault(vcpu, at(PAGES), 2), (Err(Errno::NOENT), 2));
    assert_eq!(counts(vcpu), (noted + 1, taken));
    assert_eq!(
        pre_fault(vcpu, at(PAGES - 1), 3),
        (Ok(()), 2),
        "an error after progress is told by the next call"
    );
    let met = touch(vcpu, at(PAGES), 1, Access::Read);
    assert!(matches!(met, Err(GuestError::Mmio { gpa, .. }) if gpa == at(PAGES)), "{met:?}");
    assert_eq!(counts(vcpu), (noted + 2, taken), "noted by each call, and no more by the guest");
}

/// Above all that the processor can address: ENOENT, and nothing is noted.
pub fn above_the_processors_addresses_nothing_is_noted<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    for bits in [52, 57, 62] {
        assert_eq!(pre_fault(arena.vcpu(0), Gpa::new(1 << bits), 1), (Err(Errno::NOENT), 1), "2^{bits}");
    }
    assert_eq!(count(arena.vcpu(0), "pf_mmio_spte_created"), 0);
}

/// Host memory without access (PROT_NONE), or none at all: EFAULT, for the guest too, which is told nothing else.
pub fn host_memory_without_access_is_efault<K: Kernel>(kernel: &K) {
    let mut fixture = crate::fixture::Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
    let slot = fixture.slot;
    fixture.machine.slots().revoke(slot, 2 * PAGE..3 * PAGE).expect("a part can be taken away");
    let vcpu = &mut fixture.machine.lend().vcpus[0];
    assert_eq!(pre_fault(vcpu, BASE, 4), (Ok(()), 2));
    assert_efault(vcpu, pages(2, 1).start());
    assert_eq!(pre_fault(vcpu, at(3), 1), (Ok(()), 0));

    let mut arena = arena(kernel);
    let unmapped = kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: at(PAGES).raw(),
        memory_size: PAGE,
        userspace_addr: NOWHERE,
    };
    arena.set_region(&unmapped).expect("a slot may lie where there is no memory");
    assert_efault(arena.vcpu(0), at(PAGES));
}

fn assert_efault(vcpu: &mut impl premap_guest::Guest, gpa: Gpa) {
    assert_eq!(pre_fault(vcpu, gpa, 1), (Err(Errno::FAULT), 1));
    // KVM_EXIT_MEMORY_FAULT would be another error.
    let touched = touch(vcpu, gpa, 1, Access::Read);
    assert!(matches!(touched, Err(GuestError::Call { errno: Errno::FAULT, .. })), "{touched:?}");
}

/// A signal that is there before the first page is done: EINTR, and the range stays.
pub fn a_signal_before_the_first_page_is_eintr<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    arena.fill(0..PAGES);
    let vcpu = arena.vcpu(0);
    let mut calls = 0;
    storm::pelted(|| {
        while pre_fault(vcpu, BASE, PAGES).0 != Err(Errno::INTR) {
            calls += 1;
            assert!(calls < 1_000_000, "no signal fell into a call before its first page");
        }
    });
    pre_fault_all(vcpu, BASE, PAGES);
}

/// A page that a userfaultfd is to provide: the call waits for it, and a signal ends that. What was done before counts.
pub fn a_page_that_user_space_owes_waits_until_a_signal<K: Kernel>(kernel: &K) {
    const THERE: u64 = 4;
    let mut arena = arena(kernel);
    arena.fill(0..THERE);
    let missing = match Missing::watch(arena.memory(), 0..PAGES) {
        Ok(missing) => missing,
        Err(errno) => return reach::skip(&format!("no userfaultfd can be had: {errno}")),
    };
    let patience = Duration::from_millis(20);
    let vcpu = arena.vcpu(0);
    let (result, _) = storm::interrupted_after(patience, || pre_fault(vcpu, at(THERE), 4));
    assert_eq!(result, (Err(Errno::INTR), 4));
    let (result, _) = storm::interrupted_after(patience, || pre_fault(vcpu, BASE, 2 * THERE));
    assert_eq!(result, (Ok(()), THERE));
    drop(missing);
    pre_fault_all(vcpu, BASE, PAGES);
}

/// Another process has other memory: EIO, before anything else is looked at.
pub fn another_process_gets_eio<K: Kernel>(kernel: &K) {
    let mut arena = arena(kernel);
    let vcpu = arena.vcpu(0);
    let mut range = kvm_pre_fault_memory { gpa: 1, size: 1, flags: 1, ..Default::default() };
    assert!(child::in_child(|| vcpu.pre_fault_memory(&mut range) == Err(Errno::IO)));
    assert_eq!(vcpu.pre_fault_memory(&mut range), Err(Errno::INVAL));
    pre_fault_all(vcpu, BASE, PAGES);
}
