//! What each backing holds, and what mapping it ahead saves.

use premap::{Engine, Stages, Touch};
use premap_guest::{Backing, Kernel};

use super::FEW;
use crate::fixture::{Fixture, PAGE, plan};
use crate::reach::pages_a_fault;

/// Every backing that needs no set-up of the host.
const ORDINARY: [Backing; 4] = [Backing::Anonymous, Backing::TransparentHuge, Backing::Memfd, Backing::File];

/// Both stages map every byte of any backing, and a writing guest takes next to no fault then.
pub fn every_backing_is_mapped_whole<K: Kernel>(kernel: &K) {
    for backing in ORDINARY {
        for vcpus in [1, 2] {
            let mut fixture = Fixture::new(kernel, vcpus, 1024, backing);
            let report = fixture.map(Engine::new(), &fixture.plan());
            assert!(report.is_complete(), "{backing}: {report:?}");
            let run = fixture.write_all();
            assert!(run.faults <= FEW, "{backing}: {} faults on memory mapped ahead", run.faults);
        }
    }
}

/// A pre-fault alone costs two faults a page, demand one, both stages none: why there are two stages.
pub fn the_trap_is_reproduced_and_both_stages_avoid_it<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 1000;
    let faults = |stages: Option<Stages>| {
        let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::Anonymous);
        if let Some(stages) = stages {
            fixture.map(Engine::new().stages(stages), &fixture.plan());
        }
        fixture.write_all().faults
    };
    let (demand, host) = (faults(None), faults(Some(Stages::Host)));
    let (second, both) = (faults(Some(Stages::Second)), faults(Some(Stages::Both)));
    assert!((PAGES..PAGES + FEW).contains(&demand), "demand took {demand} faults");
    assert!(
        (PAGES / pages_a_fault::<K>()..PAGES + FEW).contains(&host),
        "the host stage alone took {host} faults"
    );
    assert!((2 * PAGES..2 * PAGES + FEW).contains(&second), "the second stage alone took {second} faults");
    assert!(both <= FEW, "both stages took {both} faults");
}

/// Mapping changes no content, neither the first time nor the second, and the second time finds everything present.
pub fn content_survives_being_mapped_twice<K: Kernel>(kernel: &K) {
    for backing in ORDINARY {
        let mut fixture = Fixture::new(kernel, 2, 512, backing);
        for page in (0..512).step_by(3) {
            fixture.memory().write_word(page * PAGE, !page);
        }
        let before: Vec<_> = (0..512).map(|page| fixture.memory().read_word(page * PAGE)).collect();
        for _ in 0..2 {
            let report = fixture.map(Engine::new(), &fixture.plan());
            assert!(report.is_complete(), "{backing}: {report:?}");
            let after = (0..512).map(|page| fixture.memory().read_word(page * PAGE));
            assert!(after.eq(before.iter().copied()), "{backing}: mapping changed content");
        }
        let run = fixture.read_all();
        assert!(run.faults <= FEW, "{backing}: {} faults on memory mapped ahead", run.faults);
    }
}

/// Private file mappings populated by reading go on sharing the page cache: reads are free, and each first write costs the
/// two faults of a copy.
pub fn reading_keeps_private_files_shared<K: Kernel>(kernel: &K) {
    const PAGES: u64 = 256;
    let mut fixture = Fixture::new(kernel, 1, PAGES, Backing::File);
    let report = fixture.map(Engine::new(), &plan([fixture.region(Touch::Read)]));
    assert!(report.is_complete(), "{report:?}");
    let read = fixture.read_all();
    assert!(read.faults <= FEW, "{} faults for reading", read.faults);
    let written = fixture.write_all();
    assert!(written.faults >= 2 * PAGES, "{} faults for writing: the pages were not shared", written.faults);
}
