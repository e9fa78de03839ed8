//! Every row of the tables: in which OP_STATE and on which entry a call works, and the exact status everywhere else.
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

mod common;

use common::{Host, LP, Stage, Td, at, rcx, status};
use premap_tdx_module::{
    Class, EntryState, Gpa, Hpa, Level, OpState, Operand, Outcome, PageType, Seamcall, Stop, TDVPS_PAGES,
    Table, TdField,
};

const GPA: u64 = 0x4000_0000;

/// The rows as the specification's tables have them, put down here apart from the crate's own.
const OP_STATES: [(Seamcall, &[u32]); 21] = [
    (Seamcall::MngAddcx, &[0]),
    (Seamcall::MngInit, &[0]),
    (Seamcall::MngRd, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (Seamcall::VpCreate, &[1, 7]),
    (Seamcall::VpAddcx, &[1, 7]),
    (Seamcall::VpInit, &[1]),
    (Seamcall::VpEnter, &[2, 3, 9]),
    (Seamcall::MrFinalize, &[1]),
    (Seamcall::MrExtend, &[1]),
    (Seamcall::MemSeptAdd, &[1, 2, 3, 6, 7, 8, 9]),
    (Seamcall::MemSeptRd, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (Seamcall::MemSeptRemove, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (Seamcall::MemPageAdd, &[1]),
    (Seamcall::MemPageAug, &[1, 2, 3, 9]),
    (Seamcall::MemPageRelocate, &[1, 2, 3, 4, 5, 8, 9]),
    (Seamcall::MemRangeBlock, &[1, 2, 3, 4, 5, 8, 9]),
    (Seamcall::MemRangeUnblock, &[1, 2, 3, 4, 5, 8, 9]),
    (Seamcall::MemPageRemove, &[1, 2, 3, 4, 5, 8, 9, 10]),
    (Seamcall::MemPagePromote, &[1, 2, 3, 4, 5, 8, 9]),
    (Seamcall::MemPageDemote, &[1, 2, 3, 4, 5, 8, 9]),
    (Seamcall::MemTrack, &[1, 2, 3, 4, 5, 6, 7, 8, 9]),
];

/// A call, on a TD for which all was made ready.
type Call = Box<dyn Fn(&Host, &Td) -> Outcome>;

/// Makes a call for which everything but OP_STATE was made ready before.
fn ready(host: &Host, call: Seamcall) -> (Td, Call) {
    let page = at(GPA, Level::PT);
    let stage = match call {
        Seamcall::MngAddcx | Seamcall::MngInit => Stage::Allocated,
        Seamcall::MrFinalize | Seamcall::VpEnter => Stage::WithVcpu,
        _ => Stage::Initialized,
    };
    let td = host.td(stage);
    let tdr = td.tdr;
    let track = |level| host.block_and_track(tdr, GPA, level);
    let make: Call = match call {
        Seamcall::MngAddcx => Box::new(|host, td| host.module.mng_addcx(host.page(), td.tdr)),
        Seamcall::MngInit => {
            let params = premap_tdx_module::TdParams::default().to_bytes();
            host.module.host_write(Hpa::new(0x400), &params).unwrap();
            Box::new(|host, td| host.module.mng_init(td.tdr, Hpa::new(0x400)))
        }
        Seamcall::MngRd => Box::new(|host, td| host.module.mng_rd(td.tdr, TdField::Hkid).map(drop)),
        Seamcall::VpCreate => Box::new(|host, td| host.module.vp_create(host.page(), td.tdr)),
        Seamcall::VpAddcx | Seamcall::VpInit => {
            let tdvpr = host.page();
            host.module.vp_create(tdvpr, tdr).unwrap();
            (1..TDVPS_PAGES).for_each(|_| host.module.vp_addcx(host.page(), tdvpr).unwrap());
            if call == Seamcall::VpInit {
                Box::new(move |host, _| host.module.vp_init(LP, tdvpr, 0, 0))
            } else {
                Box::new(move |host, _| host.module.vp_addcx(host.page(), tdvpr))
            }
        }
        Seamcall::VpEnter => Box::new(|host, td| host.module.vp_enter(LP, td.vcpus[0], |_| ())),
        Seamcall::MrFinalize => Box::new(|host, td| host.module.mr_finalize(td.tdr)),
        Seamcall::MrExtend => {
            host.add(tdr, GPA, 1);
            Box::new(|host, td| host.module.mr_extend(Gpa::new(GPA), td.tdr))
        }
        Seamcall::MemSeptAdd => {
            Box::new(|host, td| host.module.mem_sept_add(at(GPA, Level::PML4), td.tdr, host.page()))
        }
        Seamcall::MemSeptRd => {
            Box::new(|host, td| host.module.mem_sept_rd(at(GPA, Level::PML4), td.tdr).map(drop))
        }
        Seamcall::MemSeptRemove => {
            host.tables(tdr, GPA, Level::PT);
            track(Level::PD);
            Box::new(|host, td| host.module.mem_sept_remove(at(GPA, Level::PD), td.tdr).map(drop))
        }
        Seamcall::MemPageAdd => {
            host.tables(tdr, GPA, Level::PT);
            Box::new(move |host, td| host.module.mem_page_add(page, td.tdr, host.page(), host.source(1)))
        }
        Seamcall::MemPageAug => {
            host.tables(tdr, GPA, Level::PT);
            Box::new(move |host, td| host.module.mem_page_aug(page, td.tdr, host.page()))
        }
        Seamcall::MemPageRelocate => {
            host.add(tdr, GPA, 1);
            track(Level::PT);
            Box::new(move |host, td| host.module.mem_page_relocate(page, td.tdr, host.page()).map(drop))
        }
        Seamcall::MemRangeBlock => {
            host.add(tdr, GPA, 1);
            Box::new(move |host, td| host.module.mem_range_block(page, td.tdr))
        }
        Seamcall::MemRangeUnblock => {
            host.add(tdr, GPA, 1);
            track(Level::PT);
            Box::new(move |host, td| host.module.mem_range_unblock(page, td.tdr))
        }
        Seamcall::MemPageRemove => {
            host.add(tdr, GPA, 1);
            track(Level::PT);
            Box::new(move |host, td| host.module.mem_page_remove(page, td.tdr).map(drop))
        }
        Seamcall::MemPagePromote => {
            let memory = host.large();
            host.tables(tdr, GPA, Level::PT);
            for index in 0..512 {
                let hpa = memory.wrapping_add(index << 12);
                host.module.mem_page_aug(at(GPA + (index << 12), Level::PT), tdr, hpa).unwrap();
            }
            track(Level::PD);
            Box::new(|host, td| host.module.mem_page_promote(at(GPA, Level::PD), td.tdr).map(drop))
        }
        Seamcall::MemPageDemote => {
            host.aug(tdr, GPA, Level::PD);
            track(Level::PD);
            Box::new(|host, td| host.module.mem_page_demote(at(GPA, Level::PD), td.tdr, host.page()))
        }
        Seamcall::MemTrack => Box::new(|host, td| host.module.mem_track(td.tdr)),
        other => panic!("{other} has no row"),
    };
    (td, make)
}

#[test]
fn each_call_works_in_its_op_states_and_is_refused_in_all_others() {
    for (call, legal) in OP_STATES {
        for &state in OpState::ALL {
            let host = Host::new();
            let (td, make) = ready(&host, call);
            host.module.put_op_state(td.tdr, state).unwrap();
            let outcome = make(&host, &td);
            if legal.contains(&(state as u32)) {
                assert_eq!(outcome, Ok(()), "{call} in {state:?}");
            } else {
                let expected = Class::OP_STATE_INCORRECT.with(state as u32);
                assert_eq!(status(outcome), expected, "{call} in {state:?}");
            }
        }
    }
}

use EntryState as E;

const ENTRIES: [(Seamcall, &[EntryState]); 9] = [
    (Seamcall::MemSeptAdd, &[E::Free]),
    (Seamcall::MemPageAdd, &[E::Free]),
    (Seamcall::MemPageAug, &[E::Free, E::Removed]),
    (
        Seamcall::MemRangeBlock,
        &[E::NonLeafMapped, E::Mapped, E::Pending, E::BlockedForWriting, E::PendingBlockedForWriting],
    ),
    (Seamcall::MemRangeUnblock, &[E::NonLeafBlocked, E::Blocked, E::PendingBlocked]),
    (
        Seamcall::MemPageRemove,
        &[
            E::Mapped,
            E::Blocked,
            E::BlockedForWriting,
            E::Pending,
            E::PendingBlocked,
            E::PendingBlockedForWriting,
        ],
    ),
    (Seamcall::MemPageDemote, &[E::Mapped, E::Blocked, E::Pending, E::PendingBlocked]),
    (Seamcall::MemSeptRemove, &[E::NonLeafMapped, E::NonLeafBlocked]),
    (Seamcall::MemSeptRd, &E::ALL),
];

/// Whether the entry has a page, a table or neither: a state belongs to one of these.
fn put(host: &Host, tdr: Hpa, level: Level, state: EntryState) {
    match state {
        E::Free | E::Removed => host.tables(tdr, GPA, level),
        E::NonLeafMapped | E::NonLeafBlocked => host.tables(tdr, GPA, level.below().unwrap()),
        _ => drop(host.aug(tdr, GPA, level)),
    }
    host.module.put_entry_state(at(GPA, level), tdr, state).unwrap();
}

#[test]
fn each_call_works_on_its_entries_and_is_refused_on_all_others() {
    for (call, legal) in ENTRIES {
        for state in E::ALL {
            let host = Host::new();
            let tdr = host.td(Stage::Initialized).tdr;
            let is_table = matches!(state, E::NonLeafMapped | E::NonLeafBlocked);
            // PAGE.ADD looks at entries of 4 KiB only, which point to no table.
            if call == Seamcall::MemPageAdd && is_table {
                continue;
            }
            let level = if call == Seamcall::MemPageAdd { Level::PT } else { Level::PD };
            put(&host, tdr, level, state);
            let (page, module) = (at(GPA, level), &host.module);
            let outcome = match call {
                Seamcall::MemSeptAdd => module.mem_sept_add(page, tdr, host.page()),
                Seamcall::MemPageAdd => module.mem_page_add(page, tdr, host.page(), host.source(1)),
                Seamcall::MemPageAug => module.mem_page_aug(page, tdr, host.large()),
                Seamcall::MemRangeBlock => module.mem_range_block(page, tdr),
                Seamcall::MemRangeUnblock => module.mem_range_unblock(page, tdr),
                Seamcall::MemPageRemove => module.mem_page_remove(page, tdr).map(drop),
                Seamcall::MemPageDemote => module.mem_page_demote(page, tdr, host.page()),
                Seamcall::MemSeptRemove => module.mem_sept_remove(page, tdr).map(drop),
                _ => module.mem_sept_rd(page, tdr).map(drop),
            };
            if legal.contains(&state) {
                assert_eq!(outcome, Ok(()), "{call} on {state:?}");
                continue;
            }
            let failure = outcome.unwrap_err();
            let blocked = matches!(state, E::NonLeafBlocked | E::Blocked | E::PendingBlocked);
            let expected = match call {
                Seamcall::MemRangeBlock if blocked => rcx(Class::GPA_RANGE_ALREADY_BLOCKED),
                _ => rcx(Class::EPT_ENTRY_STATE_INCORRECT),
            };
            assert_eq!(failure.status, expected, "{call} on {state:?}");
            let told = failure.entry.unwrap();
            assert_eq!((told.level, told.state), (level, state));
            assert_eq!(told.rdx(), u64::from(level.raw()) | u64::from(state.public()) << 8);
        }
    }
}

#[test]
fn version_1_of_sept_add_keeps_a_table_that_is_there() {
    for state in E::ALL {
        let host = Host::new();
        let tdr = host.td(Stage::Initialized).tdr;
        put(&host, tdr, Level::PD, state);
        let table = host.page();
        let outcome = host.module.mem_sept_add_or_keep(at(GPA, Level::PD), tdr, table);
        let expected = match state {
            E::Free => Ok(Table::Added),
            E::NonLeafMapped => Ok(Table::Kept),
            _ => Err(rcx(Class::EPT_ENTRY_STATE_INCORRECT)),
        };
        assert_eq!(outcome.map_err(|failure| failure.status), expected, "{state:?}");
        let kind = host.module.page_record(table.frame()).unwrap().kind;
        assert_eq!(kind == PageType::SecureEpt, state == E::Free);
    }
}

#[test]
fn a_refusal_changes_nothing() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    host.add(tdr, GPA, 1);
    let (page, table) = (host.page(), host.page());
    let children = host.module.mng_rd(tdr, TdField::ChildCount).unwrap();
    let mrtd = host.module.mng_rd_mrtd(tdr).unwrap();
    host.module.mem_page_aug(at(GPA, Level::PT), tdr, page).unwrap_err();
    host.module.mem_page_add(at(GPA, Level::PT), tdr, page, host.source(2)).unwrap_err();
    host.module.mem_sept_add(at(GPA, Level::PD), tdr, table).unwrap_err();
    assert_eq!(host.module.mng_rd(tdr, TdField::ChildCount), Ok(children));
    assert_eq!(host.module.mng_rd_mrtd(tdr), Ok(mrtd));
    for free in [page, table] {
        assert_eq!(host.module.page_record(free.frame()).unwrap().kind, PageType::Nda);
    }
}

/// Public numbers of the states: the specification's encoding table.
#[test]
fn states_are_told_by_their_public_numbers() {
    let numbers = [0, 5, 0x84, 0x81, 4, 1, 8, 2, 3, 16];
    assert!(E::ALL.iter().map(|state| state.public()).eq(numbers));
}

#[test]
fn accept_works_on_pending_entries_only() {
    for state in E::ALL {
        let host = Host::new();
        let td = host.td(Stage::Runnable);
        put(&host, td.tdr, Level::PD, state);
        let accepted =
            host.module.vp_enter(LP, td.vcpus[0], |guest| guest.accept(at(GPA, Level::PD))).unwrap();
        match state {
            E::Pending => assert_eq!(accepted, Ok(())),
            E::Mapped | E::BlockedForWriting => {
                let expected = Class::PAGE_ALREADY_ACCEPTED.with(1);
                assert_eq!(accepted, Err(Stop::Status(expected)));
            }
            E::NonLeafMapped | E::NonLeafBlocked => {
                assert_eq!(accepted, Err(Stop::Status(Class::PAGE_SIZE_MISMATCH.with(1))));
            }
            _ => {
                let Err(Stop::Exit(exit)) = accepted else { panic!("{state:?}: {accepted:?}") };
                assert_eq!((exit.gpa, exit.level, exit.state), (Gpa::new(GPA), Level::PD, state));
            }
        }
    }
}

#[test]
fn the_entry_that_a_walk_ends_at_is_told() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    host.tables(tdr, GPA, Level::PD);
    let failure = host.module.mem_page_aug(at(GPA, Level::PT), tdr, host.page()).unwrap_err();
    assert_eq!(failure.status, Class::EPT_WALK_FAILED.on(Operand::RCX));
    let entry = failure.entry.unwrap();
    assert_eq!((entry.level, entry.state), (Level::PD, E::Free));
}
