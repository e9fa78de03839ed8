//! Calls that meet, under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p premap-tdx-module --release --test loom`.
//!
//! The models run the crate's own code; tables have four entries here. Whatever the order, a call that can't have a lock is
//! told so and changes nothing, at least one of two that meet does its work where the module promises that, and no page is
//! lost or given twice.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "in a test the panic is the message")]

use loom::sync::Arc;
use premap_tdx_module::{
    Class, Config, EntryState, Gpa, Hkid, HostAccessError, Hpa, HpaRange, Level, Module, Operand, Outcome,
    PageInfo, PageType, Status, Stop,
};

mod machine;

use machine::{LP, Machine, TDMR, TDR, at, both, busy, check_count, kind, model, model_with, page, status};

const TAKEN: Status = Class::EPT_ENTRY_STATE_INCORRECT.on(Operand::RCX);

/// One call of two on one entry does its work; the other is told, and its page stays free.
fn one_of_two_on_an_entry(
    gpa: u64,
    level: Level,
    call: fn(&Module, PageInfo, Hpa) -> Outcome,
    made: PageType,
) {
    model(move || {
        let mut machine = Machine::new();
        let pages = [machine.page(), machine.page()];
        let module = Arc::new(machine.module);
        let (one, other) = both(
            &module,
            move |module| status(call(module, at(gpa, level), pages[0])),
            move |module| status(call(module, at(gpa, level), pages[1])),
        );
        let outcomes = [one, other];
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
        for (outcome, page) in outcomes.into_iter().zip(pages) {
            match outcome {
                Ok(()) => assert_eq!(kind(&module, page), made),
                Err(error) => {
                    assert!(error == busy(Operand::SEPT_ENTRY) || error == TAKEN, "{error}");
                    assert_eq!(kind(&module, page), PageType::Nda);
                }
            }
        }
        module.mem_sept_rd(at(gpa, level), TDR).unwrap();
        check_count(&module);
    });
}

#[test]
fn two_augs_of_one_entry() {
    one_of_two_on_an_entry(
        0,
        Level::PT,
        |module, page, hpa| module.mem_page_aug(page, TDR, hpa),
        PageType::Regular,
    );
}

#[test]
fn two_sept_adds_of_one_entry() {
    let gpa = Level::PD.bytes();
    one_of_two_on_an_entry(
        gpa,
        Level::PD,
        |module, at, hpa| module.mem_sept_add(at, TDR, hpa),
        PageType::SecureEpt,
    );
}

#[test]
fn augs_and_sept_adds_of_different_entries_never_meet() {
    model(|| {
        let mut machine = Machine::new();
        let (memory, table) = (machine.page(), machine.page());
        let module = Arc::new(machine.module);
        let (aug, add) = both(
            &module,
            move |module| status(module.mem_page_aug(page(0x1000), TDR, memory)),
            move |module| status(module.mem_sept_add(at(Level::PD.bytes(), Level::PD), TDR, table)),
        );
        assert_eq!((aug, add), (Ok(()), Ok(())));
        check_count(&module);
    });
}

#[test]
fn one_page_for_two_tds() {
    model(|| {
        let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).unwrap();
        let mut config = Config::new(range(TDMR, 32 << 12));
        config.memory.push(range(0, 2 << 12));
        let mut machine = Machine { module: Module::new(&config).unwrap(), next: TDMR };
        let tds = [machine.td(40), machine.td(41)];
        let memory = machine.page();
        let module = Arc::new(machine.module);
        let (one, other) = both(
            &module,
            move |module| status(module.mem_page_aug(page(0), tds[0], memory)),
            move |module| status(module.mem_page_aug(page(0), tds[1], memory)),
        );
        let refused = |outcome| {
            outcome == Err(busy(Operand::R8))
                || outcome == Err(Class::PAGE_METADATA_INCORRECT.on(Operand::R8))
        };
        let owner = match (one, other) {
            (Ok(()), other) if refused(other) => tds[0],
            (one, Ok(())) if refused(one) => tds[1],
            both => panic!("{both:?}"),
        };
        assert_eq!(module.page_record(memory.frame()).unwrap().owner, Some(owner.frame()));
    });
}

#[test]
fn an_aug_against_a_block_above_it() {
    model(|| {
        let mut machine = Machine::new();
        let memory = machine.page();
        let module = Arc::new(machine.module);
        let (aug, block) = both(
            &module,
            move |module| status(module.mem_page_aug(page(0), TDR, memory)),
            |module| status(module.mem_range_block(at(0, Level::PD), TDR)),
        );
        assert!(aug.is_ok() || block.is_ok());
        match aug {
            Ok(()) => assert_eq!(kind(&module, memory), PageType::Regular),
            Err(error) => {
                let walk = Class::EPT_WALK_FAILED.on(Operand::RCX);
                assert!(error == busy(Operand::SEPT_TREE) || error == walk, "{error}");
                assert_eq!(kind(&module, memory), PageType::Nda);
            }
        }
        if let Err(error) = block {
            assert_eq!(error, busy(Operand::SEPT_TREE));
        }
        check_count(&module);
    });
}

#[test]
fn two_page_adds_on_one_td() {
    model(|| {
        let mut machine = Machine::new();
        let pages = [machine.page(), machine.page()];
        let source = Hpa::new(0x1000);
        let module = Arc::new(machine.module);
        let add = move |module: &Module, index: u64, memory| {
            status(module.mem_page_add(page(index << 12), TDR, memory, source))
        };
        let (one, other) =
            both(&module, move |module| add(module, 0, pages[0]), move |module| add(module, 1, pages[1]));
        assert!(one.is_ok() || other.is_ok());
        for (outcome, page) in [one, other].into_iter().zip(pages) {
            match outcome {
                Ok(()) => assert_eq!(kind(&module, page), PageType::Regular),
                Err(error) => {
                    assert_eq!(error, busy(Operand::RDX));
                    assert_eq!(kind(&module, page), PageType::Nda);
                }
            }
        }
        check_count(&module);
    });
}

#[test]
fn a_page_add_against_an_aug_of_its_entry() {
    model(|| {
        let mut machine = Machine::new();
        let pages = [machine.page(), machine.page()];
        let module = Arc::new(machine.module);
        let (add, aug) = both(
            &module,
            move |module| status(module.mem_page_add(page(0), TDR, pages[0], Hpa::new(0x1000))),
            move |module| status(module.mem_page_aug(page(0), TDR, pages[1])),
        );
        assert!(add.is_ok() != aug.is_ok(), "{add:?} {aug:?}");
        for error in [add.err(), aug.err()].into_iter().flatten() {
            assert!(error == busy(Operand::RDX) || error == TAKEN, "{error}");
        }
        check_count(&module);
    });
}

#[test]
fn a_track_against_a_vcpu_that_enters() {
    model(|| {
        let mut machine = Machine::new();
        let vcpu = machine.vcpu();
        machine.module.mr_finalize(TDR).unwrap();
        let module = Arc::new(machine.module);
        let (enter, track) = both(
            &module,
            move |module| status(module.vp_enter(LP, vcpu, |_| ())),
            |module| status(module.mem_track(TDR)),
        );
        assert!(enter.is_ok() || track.is_ok());
        for error in [enter.err(), track.err()].into_iter().flatten() {
            assert_eq!(error, busy(Operand::TD_EPOCH));
        }
    });
}

/// What a guest reads is its own for as long as it is inside: what it saw mapped is not taken away under it.
#[test]
fn a_page_is_not_removed_under_a_guest_that_sees_it() {
    model(|| {
        let mut machine = Machine::new();
        let (vcpu, memory) = (machine.vcpu(), machine.page());
        machine.module.mem_page_add(page(0), TDR, memory, Hpa::new(0x1000)).unwrap();
        machine.module.mr_finalize(TDR).unwrap();
        let module = Arc::new(machine.module);
        let (saw, removed) = both(
            &module,
            move |module| {
                module.vp_enter(LP, vcpu, |guest| {
                    let saw = guest.read(Gpa::new(0), &mut [0; 8]).is_ok();
                    assert!(!saw || kind(module, memory) == PageType::Regular, "removed under the guest");
                    saw
                })
            },
            |module| {
                module.mem_range_block(page(0), TDR)?;
                module.mem_track(TDR)?;
                module.mem_page_remove(page(0), TDR)
            },
        );
        if let Err(failure) = saw {
            assert_eq!(failure.status, busy(Operand::TD_EPOCH));
        }
        match status(removed) {
            Ok(hpa) => assert_eq!((hpa, kind(&module, memory)), (memory, PageType::Nda)),
            Err(error) => {
                let untracked = Class::TLB_TRACKING_NOT_DONE.on(Operand::RCX);
                assert!(error == untracked || error == busy(Operand::TD_EPOCH), "{error}");
            }
        }
        check_count(&module);
    });
}

#[test]
fn an_accept_against_a_host_that_reads_the_entry() {
    model(|| {
        let mut machine = Machine::new();
        let (vcpu, memory) = (machine.vcpu(), machine.page());
        machine.module.mem_page_aug(page(0), TDR, memory).unwrap();
        machine.module.mr_finalize(TDR).unwrap();
        let module = Arc::new(machine.module);
        let (accept, read) = both(
            &module,
            move |module| module.vp_enter(LP, vcpu, |guest| guest.accept(page(0))).unwrap(),
            |module| status(module.mem_sept_rd(page(0), TDR)),
        );
        assert!(accept.is_ok() || read.is_ok());
        let mapped = accept.is_ok();
        if let Err(stop) = accept {
            assert_eq!(stop, Stop::Status(busy(Operand::SEPT_ENTRY)));
        }
        if let Err(error) = read {
            assert_eq!(error, busy(Operand::SEPT_ENTRY));
            // The host asked: the guest's next try gives way, until the host was there.
            let again = module.vp_enter(LP, vcpu, |guest| guest.accept(page(0))).unwrap();
            let gives_way = Class::OPERAND_BUSY_HOST_PRIORITY.on(Operand::SEPT_ENTRY);
            assert_eq!(again, Err(Stop::Status(gives_way)));
        }
        let state = module.mem_sept_rd(page(0), TDR).unwrap().state;
        assert_eq!(state, if mapped { EntryState::Mapped } else { EntryState::Pending });
    });
}

/// A table that PROMOTE gave back is used again at once; a call that was on its way into it must not write there.
#[test]
fn a_promote_against_a_call_on_the_table_that_it_gives_back() {
    model(|| {
        let mut machine = Machine::new();
        machine.next = machine.next.next_multiple_of(4 << 12);
        let first = machine.next;
        for index in 0..4 {
            let memory = machine.page();
            machine.module.mem_page_aug(page(index << 12), TDR, memory).unwrap();
        }
        let module = Arc::new(machine.module);
        let elsewhere = at(Level::PD.bytes(), Level::PD);
        let (removed, promoted) = both(
            &module,
            |module| status(module.mem_page_remove(page(0x1000), TDR)),
            move |module| {
                let promoted = status(module.mem_page_promote(at(0, Level::PD), TDR));
                if let Ok(table) = promoted {
                    module.mem_sept_add(elsewhere, TDR, table).unwrap();
                }
                promoted
            },
        );
        if promoted.is_ok() {
            let told = removed.unwrap_err();
            let walk = Class::EPT_WALK_FAILED.on(Operand::RCX);
            assert!(
                told == walk || told == busy(Operand::SEPT_ENTRY) || told == busy(Operand::RCX),
                "{told}"
            );
            assert_eq!(module.page_record(Hpa::new(first).frame()).unwrap().level, Level::PD);
            for index in 0..4 {
                let entry = page(Level::PD.bytes() + (index << 12));
                assert_eq!(module.mem_sept_rd(entry, TDR).unwrap().state, EntryState::Free);
            }
        } else {
            let conditions = Class::EPT_INVALID_PROMOTE_CONDITIONS.on(Operand::RCX);
            let told = promoted.unwrap_err();
            assert!([conditions, busy(Operand::SEPT_ENTRY), busy(Operand::RCX)].contains(&told), "{told}");
        }
        check_count(&module);
    });
}

#[test]
fn two_tds_for_one_key() {
    model(|| {
        let range = |start, bytes| HpaRange::new(Hpa::new(start), bytes).unwrap();
        let module = Arc::new(Module::new(&Config::new(range(TDMR, 4 << 12))).unwrap());
        let create =
            |module: &Module, page: u64| status(module.mng_create(Hpa::new(TDMR + (page << 12)), Hkid(40)));
        let (one, other) = both(&module, move |module| create(module, 0), move |module| create(module, 1));
        let refused =
            |outcome| outcome == Err(busy(Operand::KOT)) || outcome == Err(Class::HKID_NOT_FREE.status());
        assert!(one.is_ok() && refused(other) || other.is_ok() && refused(one), "{one:?} {other:?}");
    });
}

/// The host reads a free page while a TD's page is moved into it: it sees what was there, or nothing.
#[test]
fn a_host_that_reads_a_page_against_a_relocate_into_it() {
    model(|| {
        let mut machine = Machine::new();
        let (old, new, source) = (machine.page(), machine.page(), Hpa::new(0x1000));
        machine.module.host_write(source, &[7; 8]).unwrap();
        machine.module.mem_page_add(page(0), TDR, old, source).unwrap();
        let module = Arc::new(machine.module);
        let (moved, read) = both(
            &module,
            move |module| status(module.mem_page_relocate(page(0), TDR, new)),
            move |module| {
                let mut bytes = [1; 8];
                let read = module.host_read(new, &mut bytes);
                (read, bytes)
            },
        );
        assert_eq!(moved, Ok(old));
        match read {
            (Ok(()), bytes) => assert_eq!(bytes, [0; 8]),
            (Err(error), bytes) => assert_eq!((error, bytes), (HostAccessError::Private(new), [1; 8])),
        }
        // Where it was its bytes still are, and are no host's.
        assert_eq!(module.host_read(old, &mut [0; 8]), Err(HostAccessError::Private(old)));
    });
}

/// Three at a time: two that share the tree, on one entry, and one that wants it alone.
#[test]
fn two_augs_of_one_entry_against_a_block_above_it() {
    model_with(2, || {
        let mut machine = Machine::new();
        let pages = [machine.page(), machine.page()];
        let module = Arc::new(machine.module);
        let blocker = module.clone();
        let block = loom::thread::spawn(move || status(blocker.mem_range_block(at(0, Level::PD), TDR)));
        let (one, other) = both(
            &module,
            move |module| status(module.mem_page_aug(page(0), TDR, pages[0])),
            move |module| status(module.mem_page_aug(page(0), TDR, pages[1])),
        );
        let block = block.join().unwrap();
        assert!(
            one.is_ok() || other.is_ok() || block.is_ok(),
            "all are refused: {one:?} {other:?} {block:?}"
        );
        assert!(one.is_err() || other.is_err());
        for (outcome, page) in [one, other].into_iter().zip(pages) {
            let expected = if outcome.is_ok() { PageType::Regular } else { PageType::Nda };
            assert_eq!(kind(&module, page), expected);
        }
        check_count(&module);
    });
}
