//! Promote and demote.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use common::{Host, LP, Stage, at, rcx, status};
use premap_tdx_module::{Class, EntryState, Gpa, Hpa, Level, Operand, PageType, Stop, TdField};

const GPA: u64 = 0x4000_0000;

/// Gives a TD 512 pending pages that follow one another.
fn small_pages(host: &Host, tdr: Hpa) -> Hpa {
    let memory = host.large();
    host.tables(tdr, GPA, Level::PT);
    for index in 0..512 {
        let page = at(GPA + (index << 12), Level::PT);
        host.module.mem_page_aug(page, tdr, memory.wrapping_add(index << 12)).unwrap();
    }
    memory
}

fn levels(host: &Host, memory: Hpa) -> Vec<Level> {
    let level = |index: u64| host.module.page_record(memory.wrapping_add(index << 12).frame()).unwrap().level;
    (0..512).map(level).collect()
}

#[test]
fn small_pages_become_a_large_one_and_small_again() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    let (tdr, module, page) = (td.tdr, &host.module, at(GPA, Level::PD));
    let memory = small_pages(&host, tdr);
    let write = |guest: &premap_tdx_module::Guest<'_>| {
        for index in 0..512 {
            guest.accept(at(GPA + (index << 12), Level::PT)).unwrap();
            guest.write(Gpa::new(GPA + (index << 12)), &index.to_le_bytes()).unwrap();
        }
    };
    module.vp_enter(LP, td.vcpus[0], write).unwrap();
    let children = module.mng_rd(tdr, TdField::ChildCount).unwrap();

    assert_eq!(status(module.mem_page_promote(page, tdr)), rcx(Class::GPA_RANGE_NOT_BLOCKED));
    module.mem_range_block(page, tdr).unwrap();
    assert_eq!(status(module.mem_page_promote(page, tdr)), rcx(Class::TLB_TRACKING_NOT_DONE));
    module.mem_track(tdr).unwrap();
    let table = module.mem_page_promote(page, tdr).unwrap();
    assert_eq!(module.page_record(table.frame()).unwrap().kind, PageType::Nda);
    assert_eq!(host.state(tdr, GPA, Level::PD), EntryState::Mapped);
    assert_eq!(levels(&host, memory), [Level::PD; 512]);
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(children - 1));

    // Accepted before, at whatever size.
    let accepted =
        module.vp_enter(LP, td.vcpus[0], |guest| guest.accept(at(GPA + 0x3000, Level::PT))).unwrap();
    assert_eq!(accepted, Err(Stop::Status(Class::PAGE_ALREADY_ACCEPTED.with(1))));

    assert_eq!(status(module.mem_page_demote(page, tdr, table)), rcx(Class::GPA_RANGE_NOT_BLOCKED));
    module.mem_range_block(page, tdr).unwrap();
    assert_eq!(status(module.mem_page_demote(page, tdr, table)), rcx(Class::TLB_TRACKING_NOT_DONE));
    module.mem_track(tdr).unwrap();
    assert_eq!(
        status(module.mem_page_demote(page, tdr, memory)),
        Class::PAGE_METADATA_INCORRECT.on(Operand::R8)
    );
    module.mem_page_demote(page, tdr, table).unwrap();
    assert_eq!(levels(&host, memory), [Level::PT; 512]);
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(children));
    assert_eq!(host.state(tdr, GPA + 0x5000, Level::PT), EntryState::Mapped);
    let read = |guest: &premap_tdx_module::Guest<'_>| {
        for index in 0..512_u64 {
            let mut bytes = [0; 8];
            guest.read(Gpa::new(GPA + (index << 12)), &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), index);
        }
    };
    module.vp_enter(LP, td.vcpus[0], read).unwrap();
}

#[test]
fn what_is_not_one_page_is_not_promoted() {
    let check = |spoil: &dyn Fn(&Host, Hpa, Hpa)| {
        let host = Host::new();
        let tdr = host.td(Stage::Initialized).tdr;
        let memory = small_pages(&host, tdr);
        spoil(&host, tdr, memory);
        let failure = host.module.mem_page_promote(at(GPA, Level::PD), tdr).unwrap_err();
        assert_eq!(failure.status, rcx(Class::EPT_INVALID_PROMOTE_CONDITIONS));
        // No lock is left behind.
        for index in 0..512 {
            host.module.mem_sept_rd(at(GPA + (index << 12), Level::PT), tdr).unwrap();
        }
    };
    let page = |index: u64| at(GPA + (index << 12), Level::PT);
    let remove = |host: &Host, tdr, index| {
        host.module.mem_page_remove(page(index), tdr).unwrap();
    };
    check(&|host, tdr, _| remove(host, tdr, 511));
    check(&|host, tdr, _| remove(host, tdr, 0));
    check(&|host, tdr, _| host.module.mem_range_block(page(17), tdr).unwrap());
    check(&|host, tdr, _| host.module.put_entry_state(page(3), tdr, EntryState::Mapped).unwrap());
    check(&|host, tdr, _| {
        host.module.mem_page_remove(page(5), tdr).unwrap();
        host.module.mem_page_aug(page(5), tdr, host.page()).unwrap();
    });
    check(&|host, tdr, memory| {
        // Two pages in each other's place.
        host.module.mem_page_remove(page(1), tdr).unwrap();
        host.module.mem_page_remove(page(2), tdr).unwrap();
        host.module.mem_page_aug(page(1), tdr, memory.wrapping_add(0x2000)).unwrap();
        host.module.mem_page_aug(page(2), tdr, memory.wrapping_add(0x1000)).unwrap();
    });
}

#[test]
fn pages_that_follow_one_another_from_no_boundary_are_not_promoted() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    let memory = host.large().wrapping_add(0x1000);
    host.large();
    host.tables(tdr, GPA, Level::PT);
    for index in 0..512 {
        let page = at(GPA + (index << 12), Level::PT);
        host.module.mem_page_aug(page, tdr, memory.wrapping_add(index << 12)).unwrap();
    }
    let promoted = host.module.mem_page_promote(at(GPA, Level::PD), tdr);
    assert_eq!(status(promoted), rcx(Class::EPT_INVALID_PROMOTE_CONDITIONS));
}

#[test]
fn pages_of_1_gib_are_made_and_split() {
    let host = Host::with(|config| {
        let gib = common::range(4 << 30, 1 << 30);
        config.memory.push(gib);
        config.tdmrs.push(gib);
    });
    let tdr = host.td(Stage::Initialized).tdr;
    let module = &host.module;
    host.tables(tdr, GPA, Level::PD);
    for index in 0..512_u64 {
        let hpa = Hpa::new((4 << 30) + (index << 21));
        module.mem_page_aug(at(GPA + (index << 21), Level::PD), tdr, hpa).unwrap();
    }
    let table = module.mem_page_promote(at(GPA, Level::PDPT), tdr).unwrap();
    assert_eq!(
        module.page_record(Hpa::new(5 << 30).wrapping_add(!0xfff).frame()).unwrap().level,
        Level::PDPT
    );
    module.mem_page_demote(at(GPA, Level::PDPT), tdr, table).unwrap();
    assert_eq!(host.state(tdr, GPA + (7 << 21), Level::PD), EntryState::Pending);
    let table = module.mem_page_promote(at(GPA, Level::PDPT), tdr).unwrap();
    let children = module.mng_rd(tdr, TdField::ChildCount).unwrap();
    assert_eq!(module.mem_page_remove(at(GPA, Level::PDPT), tdr), Ok(Hpa::new(4 << 30)));
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(children - (1 << 18)));
    module.mem_sept_add(at(GPA, Level::PDPT), tdr, table).unwrap();
}

#[test]
fn large_memory_is_given_whole_or_not_at_all() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    let module = &host.module;
    host.tables(tdr, GPA, Level::PD);
    let (memory, page) = (host.large(), at(GPA, Level::PD));
    let aug = |memory| module.mem_page_aug(page, tdr, memory);
    assert_eq!(status(aug(memory.wrapping_add(0x1000))), Class::OPERAND_INVALID.on(Operand::R8));
    // A page in its middle is a table.
    module.mem_sept_add(at(1 << 39, Level::PML4), tdr, memory.wrapping_add(0x5000)).unwrap();
    assert_eq!(status(aug(memory)), Class::PAGE_METADATA_INCORRECT.on(Operand::R8));
    module.mem_sept_remove(at(1 << 39, Level::PML4), tdr).unwrap();
    aug(memory).unwrap();
    // A part of it can't be given again.
    let part = memory.wrapping_add(0x7000);
    let small = module.mem_sept_add(at(1 << 39, Level::PML4), tdr, part);
    assert_eq!(status(small), Class::PAGE_METADATA_INCORRECT.on(Operand::R8));
}

#[test]
fn a_larger_page_that_is_pending_is_accepted_by_its_own_size_only() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    host.aug(td.tdr, GPA, Level::PD);
    let accepted = host.module.vp_enter(LP, td.vcpus[0], |guest| {
        let small = guest.accept(at(GPA + 0x1000, Level::PT));
        assert!(matches!(small, Err(Stop::Exit(exit)) if exit.level == Level::PD));
        assert!(matches!(guest.read(Gpa::new(GPA), &mut [0]), Err(Stop::Exit(_))));
        guest.accept(at(GPA, Level::PD))?;
        let mut bytes = [1; 8];
        guest.read(Gpa::new(GPA + 0x1f_fff8), &mut bytes)?;
        assert_eq!(bytes, [0; 8]);
        guest.accept(at(GPA, Level::PD))
    });
    assert_eq!(accepted, Ok(Err(Stop::Status(Class::PAGE_ALREADY_ACCEPTED.with(1)))));
}
