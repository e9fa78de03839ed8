//! Which levels each call takes, in TDs of four levels and of five; and where private memory ends.

mod common;

use common::{Host, Stage, at, rcx};
use premap_tdx_module::{Class, Gpa, Hpa, Level, PageInfo, Seamcall, TdParams};

fn call(host: &Host, call: Seamcall, page: PageInfo, tdr: Hpa) -> Option<Class> {
    let module = &host.module;
    let outcome = match call {
        Seamcall::MemSeptAdd => module.mem_sept_add(page, tdr, host.page()),
        Seamcall::MemSeptRd => module.mem_sept_rd(page, tdr).map(drop),
        Seamcall::MemSeptRemove => module.mem_sept_remove(page, tdr).map(drop),
        Seamcall::MemPageAdd => module.mem_page_add(page, tdr, host.page(), host.source(1)),
        Seamcall::MemPageAug => module.mem_page_aug(page, tdr, host.page()),
        Seamcall::MemPageRelocate => module.mem_page_relocate(page, tdr, host.page()).map(drop),
        Seamcall::MemPagePromote => module.mem_page_promote(page, tdr).map(drop),
        Seamcall::MemPageDemote => module.mem_page_demote(page, tdr, host.page()),
        Seamcall::MemPageRemove => module.mem_page_remove(page, tdr).map(drop),
        Seamcall::MemRangeBlock => module.mem_range_block(page, tdr),
        Seamcall::MemRangeUnblock => module.mem_range_unblock(page, tdr),
        other => panic!("{other} has no level"),
    };
    let failure = outcome.err()?;
    assert!(failure.status.is_error());
    Some(failure.class())
}

/// First and last level of each call; the top level as 9.
const LEVELS: [(Seamcall, u8, u8); 11] = [
    (Seamcall::MemSeptAdd, 1, 9),
    (Seamcall::MemSeptRd, 0, 9),
    (Seamcall::MemSeptRemove, 1, 9),
    (Seamcall::MemPageAdd, 0, 0),
    (Seamcall::MemPageAug, 0, 1),
    (Seamcall::MemPageRelocate, 0, 0),
    (Seamcall::MemPagePromote, 1, 2),
    (Seamcall::MemPageDemote, 1, 2),
    (Seamcall::MemPageRemove, 0, 2),
    (Seamcall::MemRangeBlock, 0, 9),
    (Seamcall::MemRangeUnblock, 0, 9),
];

#[test]
fn each_call_takes_its_levels_and_no_others() {
    for five_levels in [false, true] {
        let params = TdParams { five_levels, ..TdParams::default() };
        let top = if five_levels { 4 } else { 3 };
        for (seamcall, first, last) in LEVELS {
            for level in 0..8 {
                let host = Host::new();
                let tdr = host.td_with(Stage::Initialized, &params).tdr;
                let class = call(&host, seamcall, PageInfo::from_raw(u64::from(level)), tdr);
                let taken = (first..=last.min(top)).contains(&level);
                // A level that is taken may fail later: nothing is mapped.
                let invalid = class == Some(Class::OPERAND_INVALID);
                assert_eq!(invalid, !taken, "{seamcall} on level {level}, top {top}: {class:?}");
            }
        }
    }
}

#[test]
fn addresses_must_be_aligned_to_the_level_and_private() {
    let check = |gpaw: bool, gpa: u64, expected: bool| {
        let host = Host::new();
        let params = TdParams { gpaw, five_levels: gpaw, ..TdParams::default() };
        let tdr = host.td_with(Stage::Initialized, &params).tdr;
        let refused = |page| call(&host, Seamcall::MemSeptRd, page, tdr) == Some(Class::OPERAND_INVALID);
        assert_eq!(
            !refused(PageInfo::new(Gpa::new(gpa), if gpaw { Level::PML5 } else { Level::PML4 })),
            expected
        );
    };
    check(false, 0, true);
    check(false, 0x20_0000, false);
    check(false, (1 << 47) - (1 << 39), true);
    check(false, 1 << 47, false);
    check(false, 1 << 51, false);
    check(true, 0, true);
    check(true, 1 << 39, false);
    check(true, 1 << 48, true);
    check(true, (1 << 51) - (1 << 48), true);
    check(true, 1 << 51, false);
}

#[test]
fn five_levels_lead_from_the_root_to_a_page() {
    let host = Host::new();
    let params = TdParams { five_levels: true, gpaw: true, ..TdParams::default() };
    let tdr = host.td_with(Stage::Initialized, &params).tdr;
    let gpa = 0x7_0000_4000_3000_u64;
    let aug = || host.module.mem_page_aug(at(gpa, Level::PT), tdr, host.page());
    for level in [Level::PML5, Level::PML4, Level::PDPT, Level::PD] {
        assert_eq!(aug().unwrap_err().status, rcx(Class::EPT_WALK_FAILED));
        host.module.mem_sept_add(at(gpa, level), tdr, host.page()).unwrap();
    }
    aug().unwrap();
}
