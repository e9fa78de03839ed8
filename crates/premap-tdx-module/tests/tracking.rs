//! TLB tracking: when what was blocked may be taken away.

mod common;

use common::{Host, LP, OTHER_LP, Stage, at, rcx, status};
use premap_tdx_module::{Cause, Class, EntryState, Gpa, Level, OpState, Operand, Stop, TdField};

const GPA: u64 = 0x4000_0000;

fn untracked() -> premap_tdx_module::Status {
    rcx(Class::TLB_TRACKING_NOT_DONE)
}

#[test]
fn a_page_is_removed_at_once_while_the_td_cannot_run() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    let memory = host.add(tdr, GPA, 1);
    assert_eq!(host.module.mem_page_remove(at(GPA, Level::PT), tdr), Ok(memory));
    assert_eq!(host.state(tdr, GPA, Level::PT), EntryState::Free);
    // And so in every other state in which no vCPU runs.
    for state in [OpState::PausedExport, OpState::PostExport, OpState::PostImport, OpState::FailedImport] {
        let host = Host::new();
        let tdr = host.td(Stage::Initialized).tdr;
        host.add(tdr, GPA, 1);
        host.module.put_op_state(tdr, state).unwrap();
        host.module.mem_page_remove(at(GPA, Level::PT), tdr).unwrap();
    }
}

#[test]
fn a_running_tds_page_is_blocked_and_tracked_first() {
    for state in [OpState::Runnable, OpState::LiveExport, OpState::LiveImport] {
        let host = Host::new();
        let td = host.td(Stage::Runnable);
        let (page, module) = (at(GPA, Level::PT), &host.module);
        host.aug(td.tdr, GPA, Level::PT);
        module.put_op_state(td.tdr, state).unwrap();
        assert_eq!(status(module.mem_page_remove(page, td.tdr)), rcx(Class::GPA_RANGE_NOT_BLOCKED));
        module.mem_range_block(page, td.tdr).unwrap();
        assert_eq!(host.state(td.tdr, GPA, Level::PT), EntryState::PendingBlocked);
        assert_eq!(status(module.mem_range_block(page, td.tdr)), rcx(Class::GPA_RANGE_ALREADY_BLOCKED));
        assert_eq!(status(module.mem_page_remove(page, td.tdr)), untracked());
        let unblocked = module.mem_range_unblock(page, td.tdr);
        assert_eq!(status(unblocked), Class::TLB_TRACKING_NOT_DONE.on(Operand::SEPT_TREE));
        module.mem_track(td.tdr).unwrap();
        module.mem_page_remove(page, td.tdr).unwrap();
    }
}

#[test]
fn a_vcpu_that_entered_before_the_block_keeps_the_page() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let second = host.vcpu(td.tdr, OTHER_LP);
    let (tdr, module, page) = (td.tdr, &host.module, at(GPA, Level::PT));
    host.add(tdr, GPA, 1);
    module.mr_finalize(tdr).unwrap();
    module
        .vp_enter(LP, td.vcpus[0], |guest| {
            guest.write(Gpa::new(GPA), &[1]).unwrap();
            host.block_and_track(tdr, GPA, Level::PT);
            assert_eq!(module.mng_rd(tdr, TdField::Epoch), Ok(2));
            assert_eq!(status(module.mem_page_remove(page, tdr)), untracked());
            assert_eq!(status(module.mem_track(tdr)), Class::PREVIOUS_TLB_EPOCH_BUSY.status());
            // One that enters now is in the new epoch, and finds the page blocked.
            let stopped =
                module.vp_enter(OTHER_LP, second, |guest| guest.read(Gpa::new(GPA), &mut [0])).unwrap();
            let Err(Stop::Exit(exit)) = stopped else { panic!("{stopped:?}") };
            assert_eq!((exit.cause, exit.state), (Cause::Read, EntryState::Blocked));
            assert_eq!(status(module.mem_page_remove(page, tdr)), untracked());
        })
        .unwrap();
    // It left: nobody is in the epoch of the block any more, and no second TRACK is needed.
    module.mem_page_remove(page, tdr).unwrap();
}

#[test]
fn a_vcpu_of_the_new_epoch_does_not_keep_the_page() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    host.add(td.tdr, GPA, 1);
    host.module.mr_finalize(td.tdr).unwrap();
    host.block_and_track(td.tdr, GPA, Level::PT);
    host.module
        .vp_enter(LP, td.vcpus[0], |_| {
            host.module.mem_page_remove(at(GPA, Level::PT), td.tdr).unwrap();
        })
        .unwrap();
}

#[test]
fn a_block_of_the_same_epoch_as_another_track_is_not_tracked() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    host.aug(td.tdr, GPA, Level::PT);
    host.aug(td.tdr, GPA + 0x1000, Level::PT);
    host.block_and_track(td.tdr, GPA, Level::PT);
    host.module.mem_range_block(at(GPA + 0x1000, Level::PT), td.tdr).unwrap();
    assert_eq!(status(host.module.mem_page_remove(at(GPA + 0x1000, Level::PT), td.tdr)), untracked());
    host.module.mem_page_remove(at(GPA, Level::PT), td.tdr).unwrap();
    host.module.mem_track(td.tdr).unwrap();
    host.module.mem_page_remove(at(GPA + 0x1000, Level::PT), td.tdr).unwrap();
}

#[test]
fn a_blocked_table_hides_what_is_below_and_an_empty_one_goes() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let (tdr, module) = (td.tdr, &host.module);
    host.add(tdr, GPA, 7);
    module.mr_finalize(tdr).unwrap();
    let table = at(GPA, Level::PD);
    assert_eq!(status(module.mem_sept_remove(table, tdr)), rcx(Class::GPA_RANGE_NOT_BLOCKED));
    module.mem_range_block(table, tdr).unwrap();
    assert_eq!(host.state(tdr, GPA, Level::PD), EntryState::NonLeafBlocked);
    assert_eq!(status(module.mem_sept_remove(table, tdr)), untracked());
    assert_eq!(status(module.mem_sept_rd(at(GPA, Level::PT), tdr)), rcx(Class::EPT_WALK_FAILED));
    let stopped = module.vp_enter(LP, td.vcpus[0], |guest| guest.read(Gpa::new(GPA), &mut [0])).unwrap();
    assert!(matches!(stopped, Err(Stop::Exit(exit)) if exit.level == Level::PD));
    module.mem_track(tdr).unwrap();
    assert_eq!(status(module.mem_sept_remove(table, tdr)), rcx(Class::EPT_PAGE_NOT_FREE));
    module.mem_range_unblock(table, tdr).unwrap();
    host.block_and_track(tdr, GPA, Level::PT);
    module.mem_page_remove(at(GPA, Level::PT), tdr).unwrap();
    host.block_and_track(tdr, GPA, Level::PD);
    let children = module.mng_rd(tdr, TdField::ChildCount).unwrap();
    let freed = module.mem_sept_remove(table, tdr).unwrap();
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(children - 1));
    assert_eq!(host.state(tdr, GPA, Level::PD), EntryState::Free);
    // The page is free again, as a table or anything else.
    module.mem_sept_add(table, tdr, freed).unwrap();
}

#[test]
fn a_block_taken_back_leaves_the_page_as_it_was() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    host.add(td.tdr, GPA, 7);
    host.module.mr_finalize(td.tdr).unwrap();
    host.block_and_track(td.tdr, GPA, Level::PT);
    host.module.mem_range_unblock(at(GPA, Level::PT), td.tdr).unwrap();
    let read = host.module.vp_enter(LP, td.vcpus[0], |guest| {
        let mut byte = [0];
        guest.read(Gpa::new(GPA + 5), &mut byte).map(|()| byte)
    });
    assert_eq!(read, Ok(Ok([7])));
}

#[test]
fn a_page_is_relocated_with_its_content() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let (tdr, module, page) = (td.tdr, &host.module, at(GPA, Level::PT));
    let old = host.add(tdr, GPA, 9);
    module.mr_finalize(tdr).unwrap();
    let new = host.page();
    assert_eq!(status(module.mem_page_relocate(page, tdr, new)), rcx(Class::GPA_RANGE_NOT_BLOCKED));
    module.mem_range_block(page, tdr).unwrap();
    assert_eq!(status(module.mem_page_relocate(page, tdr, new)), untracked());
    module.mem_track(tdr).unwrap();
    assert_eq!(status(module.mem_page_relocate(page, tdr, old)), Class::OPERAND_INVALID.on(Operand::R8));
    assert_eq!(
        status(module.mem_page_relocate(page, tdr, tdr)),
        Class::PAGE_METADATA_INCORRECT.on(Operand::R8)
    );
    assert_eq!(module.mem_page_relocate(page, tdr, new), Ok(old));
    let read = module.vp_enter(LP, td.vcpus[0], |guest| {
        let mut byte = [0];
        guest.read(Gpa::new(GPA), &mut byte).map(|()| byte)
    });
    assert_eq!(read, Ok(Ok([9])));
    assert_eq!(module.page_record(old.frame()).unwrap().owner, None);
    assert_eq!(module.page_record(new.frame()).unwrap().owner, Some(tdr.frame()));
}
