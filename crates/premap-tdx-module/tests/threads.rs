//! Threads that really run side by side: what is refused is busy, and nothing is lost.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::{Host, LP, OTHER_LP, Stage, at};
use premap_tdx_module::{Class, EntryState, Gpa, Level, Operand, Outcome, Stop, TdField};

/// Makes a call until it is not busy.
fn patiently<T>(mut call: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    loop {
        match call() {
            Err(failure) if failure.class() == Class::OPERAND_BUSY => thread::yield_now(),
            outcome => return outcome,
        }
    }
}

#[test]
fn tables_and_pages_of_disjoint_ranges_are_never_busy() {
    let host = Host::new();
    let td = host.td(Stage::Runnable);
    let before = host.module.mng_rd(td.tdr, TdField::ChildCount).unwrap();
    // The tables that both share are there before.
    host.tables(td.tdr, 0, Level::PDPT);
    host.tables(td.tdr, 1 << 39, Level::PDPT);
    const PAGES: u64 = 2048;
    thread::scope(|scope| {
        for worker in 0..2_u64 {
            let (host, tdr) = (&host, td.tdr);
            scope.spawn(move || {
                for page in 0..PAGES {
                    // Everything unwrapped: not one call may find another in its way.
                    host.aug(tdr, (worker << 39) + (page << 12), Level::PT);
                }
            });
        }
    });
    // Two tables at the top, then one of PDPT and four of PT each.
    let tables = 2 + 2 * (1 + PAGES / 512);
    assert_eq!(host.module.mng_rd(td.tdr, TdField::ChildCount), Ok(before + 2 * PAGES + tables));
}

#[test]
fn pages_are_added_one_at_a_time_and_none_is_lost() {
    let host = Host::new();
    let tdr = host.td(Stage::Initialized).tdr;
    host.tables(tdr, 0, Level::PT);
    let source = host.source(3);
    let before = host.module.mng_rd(tdr, TdField::ChildCount).unwrap();
    thread::scope(|scope| {
        for worker in 0..3_u64 {
            let host = &host;
            scope.spawn(move || {
                for page in (0..512_u64).filter(|page| page % 3 == worker) {
                    let memory = host.page();
                    patiently(|| host.module.mem_page_add(at(page << 12, Level::PT), tdr, memory, source))
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(host.module.mng_rd(tdr, TdField::ChildCount), Ok(before + 512));
    assert!((0..512_u64).all(|page| host.state(tdr, page << 12, Level::PT) == EntryState::Mapped));
}

/// A guest accepts and writes while the host gives, blocks, tracks and removes the same pages.
#[test]
fn a_guest_and_a_host_at_the_same_pages() {
    const PAGES: u64 = 8;
    const ROUNDS: u64 = 300;
    let host = Host::new();
    let td = host.td(Stage::WithVcpu);
    let second = host.vcpu(td.tdr, OTHER_LP);
    host.tables(td.tdr, 0, Level::PT);
    host.module.mr_finalize(td.tdr).unwrap();
    let (module, tdr) = (&host.module, td.tdr);
    let before = module.mng_rd(tdr, TdField::ChildCount).unwrap();
    let (done, accepted) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for (here, vcpu) in [(LP, td.vcpus[0]), (OTHER_LP, second)] {
            let (done, accepted) = (&done, &accepted);
            scope.spawn(move || {
                let mut turn = 0_u64;
                while !done.load(Ordering::Acquire) {
                    turn += 1;
                    let gpa = (turn % PAGES) << 12;
                    let run = module.vp_enter(here, vcpu, |guest| match guest.accept(at(gpa, Level::PT)) {
                        Ok(()) => {
                            accepted.fetch_add(1, Ordering::Relaxed);
                            let mut bytes = [1; 8];
                            // Another vCPU may have written it, or the host have blocked it; if it reads it holds no
                            // other page's bytes.
                            if guest.read(Gpa::new(gpa), &mut bytes).is_ok() {
                                let value = u64::from_le_bytes(bytes);
                                assert!(value == 0 || value == gpa + 1, "{value:#x} at {gpa:#x}");
                            }
                            let _ = guest.write(Gpa::new(gpa), &(gpa + 1).to_le_bytes());
                        }
                        Err(Stop::Status(status)) => {
                            let class = status.class();
                            let expected = [
                                Class::PAGE_ALREADY_ACCEPTED,
                                Class::OPERAND_BUSY,
                                Class::OPERAND_BUSY_HOST_PRIORITY,
                            ];
                            assert!(expected.contains(&class), "{status}");
                            let _ = guest.write(Gpa::new(gpa), &(gpa + 1).to_le_bytes());
                        }
                        Err(Stop::Exit(exit)) => assert_eq!(exit.gpa, Gpa::new(gpa)),
                    });
                    if let Err(failure) = run {
                        assert_eq!(failure.status, Class::OPERAND_BUSY.on(Operand::TD_EPOCH));
                    }
                }
            });
        }
        let pages: Vec<_> = (0..PAGES).map(|_| host.page()).collect();
        for round in 0..ROUNDS {
            let (page, memory) =
                (at((round % PAGES) << 12, Level::PT), pages[usize::try_from(round % PAGES).unwrap()]);
            patiently(|| module.mem_page_aug(page, tdr, memory)).unwrap();
            if round % 3 == 0 {
                thread::yield_now();
            }
            patiently(|| module.mem_range_block(page, tdr)).unwrap();
            loop {
                match module.mem_track(tdr) {
                    Ok(()) => break,
                    Err(failure) => {
                        let again = [Class::OPERAND_BUSY, Class::PREVIOUS_TLB_EPOCH_BUSY];
                        assert!(again.contains(&failure.class()), "{failure}");
                        thread::yield_now();
                    }
                }
            }
            loop {
                match patiently(|| module.mem_page_remove(page, tdr)) {
                    Ok(removed) => break assert_eq!(removed, memory),
                    Err(failure) => assert_eq!(failure.class(), Class::TLB_TRACKING_NOT_DONE),
                }
                thread::yield_now();
            }
        }
        done.store(true, Ordering::Release);
    });
    assert_eq!(module.mng_rd(tdr, TdField::ChildCount), Ok(before));
    println!("accepted {} of {ROUNDS}", accepted.into_inner());
}
