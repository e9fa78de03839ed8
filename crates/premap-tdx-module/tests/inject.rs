//! Calls that fail on request, and that have no effect then.

mod common;

use std::sync::Arc;

use common::{Host, Stage, at, status};
use premap_tdx_module::inject::{Injector, Nth};
use premap_tdx_module::{Class, EntryState, Level, Operand, PageType, Seamcall, Status, TdField};

const GPA: u64 = 0x4000_0000;

#[test]
fn the_nth_call_of_a_kind_fails_without_effect() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    host.tables(tdr, GPA, Level::PT);
    let (busy, module) = (Class::OPERAND_BUSY.on(Operand::SEPT_ENTRY), &host.module);
    let nth = Arc::new(Nth::new(Seamcall::MemPageAug, 1, busy).times(2));
    module.inject(Some(nth.clone()));
    let before = module.mng_rd(tdr, TdField::ChildCount).unwrap();
    let outcomes: Vec<_> = (0..4)
        .map(|index| {
            let (page, memory) = (at(GPA + (index << 12), Level::PT), host.page());
            let outcome = module.mem_page_aug(page, tdr, memory).map_err(|failure| failure.status);
            let expected = if outcome.is_ok() { PageType::Regular } else { PageType::Nda };
            assert_eq!(module.page_record(memory.frame()).unwrap().kind, expected);
            outcome
        })
        .collect();
    assert_eq!(outcomes, [Ok(()), Err(busy), Err(busy), Ok(())]);
    assert_eq!(nth.seen(), 4);
    assert_eq!(host.state(tdr, GPA + 0x1000, Level::PT), EntryState::Free);
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(before + 2));
    let count = module.counts().of(Seamcall::MemPageAug);
    assert_eq!((count.calls, count.refused), (4, 2));
    module.inject(None);
    host.aug(tdr, GPA + 0x1000, Level::PT);
}

/// Fails every call.
#[derive(Debug)]
struct Everything(Status);

impl Injector for Everything {
    fn fail(&self, _: Seamcall) -> Option<Status> {
        Some(self.0)
    }
}

#[test]
fn every_call_can_be_made_to_fail() {
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let entropy = Class::RND_NO_ENTROPY.status();
    host.module.inject(Some(Arc::new(Everything(entropy))));
    assert_eq!(status(host.module.mr_finalize(td.tdr)), entropy);
    assert_eq!(status(host.module.mem_track(td.tdr)), entropy);
    assert_eq!(status(host.module.vp_enter(common::LP, td.vcpus[0], |_| panic!("it must not run"))), entropy);
    host.module.inject(None);
    host.module.mr_finalize(td.tdr).unwrap();
}
