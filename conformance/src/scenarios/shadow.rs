//! A KVM without two-dimensional paging (`npt=0`, `ept=0`): nothing can be pre-faulted, and guests run.

use premap::{Engine, Unsupported};
use premap_guest::{Access, Backing, Guest, GuestError, Kernel, Mode, word_of};
use premap_kvm::abi::KVM_CAP_PRE_FAULT_MEMORY;
use premap_kvm::{Errno, Vm};

use crate::fixture::{BASE, Fixture, PAGE};
use crate::raw::{Arena, RawSlot, pre_fault, touch};

const PAGES: u64 = 64;

/// The engine does the host stage and says why there is no second: told of the VM it knows; else it learns from the call that
/// it can't be, and asks once only.
pub fn shadow_paging_gets_the_host_stage_and_the_reason<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
    let plan = fixture.plan();
    let lent = fixture.machine.lend();
    let report = Engine::new().vm(lent.vm).run(&plan, lent.vcpus).expect("the run can begin");
    assert_eq!(report.second.unsupported, Some(Unsupported::ShadowPaging));
    assert_eq!((report.host.mapped, report.second.skipped), (plan.bytes(), plan.bytes()));
    let report = fixture.map(Engine::new(), &plan);
    assert_eq!((report.second.unsupported, report.second.calls), (Some(Unsupported::Unknown), 1));
    assert_eq!((report.host.mapped, report.second.skipped), (plan.bytes(), plan.bytes()));
    fixture.write_all();
}

/// The capability is 0 and the call EOPNOTSUPP, whatever the vCPU is about; and its guest runs.
pub fn without_tdp_no_mode_can_be_pre_faulted<K: Kernel>(kernel: &K) {
    let mut arena = Arena::new(kernel, PAGES, Backing::Anonymous);
    assert_eq!(arena.machine.vm().check_extension(KVM_CAP_PRE_FAULT_MEMORY), Ok(0));
    for number in [0, 1 << 16] {
        let slot = RawSlot { number, flags: 0, gpa: BASE, pages: PAGES, from: 0 };
        // A KVM without system management mode has one address space.
        assert!(arena.set(slot).is_ok() || number > 0);
    }
    for mode in Mode::ALL {
        match arena.vcpu(0).enter(mode) {
            Ok(()) => {}
            // L1 can't have nested paging where L0 has none.
            Err(error @ GuestError::NoMode { .. }) => {
                eprintln!("skipped: {error}");
                continue;
            }
            Err(error) => panic!("entering {mode}: {error}"),
        }
        assert_eq!(pre_fault(arena.vcpu(0), BASE, PAGES), (Err(Errno::OPNOTSUPP), PAGES), "{mode}");
        if mode != Mode::PagingOff {
            arena.fill(0..PAGES);
            touch(arena.vcpu(0), BASE, PAGES, Access::Write).expect("the guest runs to its end");
            assert!((0..PAGES).all(|page| arena.memory().read_word(page * PAGE) == word_of(page)), "{mode}");
        }
    }
}
