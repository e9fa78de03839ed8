//! Dirty logging, and what it does to mappings.

use premap::{Engine, Reason, Stage, Unmapped};
use premap_guest::{Backing, Kernel, MappedPages, SlotFlags};

use crate::fixture::{BASE, Fixture, PAGE, pages};
use crate::raw::pre_fault_all;
use crate::reach;

const PAGES: u64 = 1024;

fn small(pages_4k: u64) -> MappedPages {
    MappedPages { pages_4k, ..MappedPages::default() }
}

/// The pages mapped beyond those that the guest itself takes.
fn mapped<K: Kernel>(fixture: &Fixture<K>, own: MappedPages) -> MappedPages {
    let all = fixture.machine.mapped().expect("pages are counted");
    MappedPages {
        pages_4k: all.pages_4k - own.pages_4k,
        pages_2m: all.pages_2m - own.pages_2m,
        pages_1g: all.pages_1g - own.pages_1g,
    }
}

/// Two huge pages become 1024 small ones when logging begins; the shadow MMU waits for the first write of each. When logging ends
/// they are huge again: at once since Linux 6.13, and at the next touch before that and in the shadow MMU.
pub fn logging_splits_huge_pages_and_its_end_brings_them_back<K: Kernel>(kernel: &K) {
    let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::TransparentHuge);
    let (slot, huge) = (fixture.slot, MappedPages { pages_2m: PAGES / 512, ..MappedPages::default() });
    fixture.machine.map_own_memory(fixture.writes().range).expect("the guest reaches its memory");
    let own = fixture.machine.mapped().expect("pages are counted");
    assert!(fixture.map(Engine::new(), &fixture.plan()).is_complete());
    if mapped(&fixture, own) != huge {
        return reach::skip("the host gave no huge pages");
    }
    fixture.machine.slots().set_flags(slot, SlotFlags::LOG_DIRTY).expect("logging can begin");
    let tdp_mmu = reach::has_tdp_mmu::<K>();
    assert_eq!(mapped(&fixture, own), if tdp_mmu { small(PAGES) } else { huge });
    assert_eq!(fixture.dirty(), 0);
    fixture.write_all();
    assert_eq!((mapped(&fixture, own), fixture.dirty()), (small(PAGES), PAGES));
    fixture.machine.slots().set_flags(slot, SlotFlags::NONE).expect("logging can end");
    let in_place = tdp_mmu && reach::version(&kernel.release()) >= Some((6, 13));
    let after = if in_place { huge } else { small(0) };
    assert_eq!(mapped(&fixture, own), after);
    fixture.write_all();
    assert_eq!(mapped(&fixture, own), huge);
}

/// A mapping that is there: Linux before 6.13 makes it anew, writable and logged as such; later ones leave it alone.
pub fn a_mapping_that_is_there_is_made_anew_only_before_6_13<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 64;
    let mut fixture = Fixture::with_flags(kernel, 1, PAGES, Backing::Anonymous, SlotFlags::LOG_DIRTY);
    assert!(fixture.map(Engine::new(), &fixture.plan()).is_complete());
    assert_eq!(fixture.dirty(), PAGES);
    pre_fault_all(&mut fixture.machine.lend().vcpus[0], BASE, PAGES);
    let anew = if reach::version(&kernel.release()) < Some((6, 13)) { PAGES } else { 0 };
    assert_eq!(fixture.dirty(), anew);
}

/// What the engine is told is logged, it makes present on the host and leaves clean; the rest it maps.
pub fn memory_that_is_told_to_be_logged_stays_clean<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 64;
    let mut fixture = Fixture::with_flags(kernel, 1, PAGES, Backing::Anonymous, SlotFlags::LOG_DIRTY);
    let report = fixture.map(Engine::new().dirty_logged([pages(0, PAGES - 8)]), &fixture.plan());
    assert_eq!(report.host.mapped, PAGES * PAGE);
    assert_eq!((report.second.mapped, report.second.skipped), (8 * PAGE, (PAGES - 8) * PAGE));
    let expected = Unmapped { stage: Stage::Second, range: pages(0, PAGES - 8), reason: Reason::DirtyLogged };
    assert_eq!(report.unmapped, [expected]);
    assert_eq!(fixture.dirty(), 8);
}
