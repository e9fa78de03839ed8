//! The protocol under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p premap-mmu --release --test loom`.
//!
//! The models run the crate's own code. Tables have four entries here.
#![cfg(loom)]
// UNSAFETY: an allocator that watches its frames, and cells that loom checks.
#![expect(unsafe_code, reason = "the allocator trait and loom's cells are unsafe")]

mod watched;

use std::sync::Arc as StdArc;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use premap_mmu::{
    Access, Attributes, Edges, Ept, Gpa, GpaRange, Levels, Mirror, NoMirror, Obstacle, PAGE_SIZE, PageSize,
    PageTable, Permissions, Pfn, Present,
};
use watched::Watched;

type Table<M = NoMirror> = PageTable<Ept, StdArc<Watched>, M>;

fn table(frames: usize) -> Arc<Table> {
    Arc::new(PageTable::new(Watched::new(frames), Levels::Four).expect("a frame"))
}

fn at(page: u64) -> Gpa {
    Gpa::new(page * PAGE_SIZE)
}

fn all() -> Attributes<Ept> {
    Attributes::new(Permissions::ALL)
}

fn map(table: &Table, page: u64, pfn: u64) -> Option<Obstacle<std::convert::Infallible>> {
    let done = table.place(at(page), PageSize::Size4K, Pfn::new(pfn), all(), Present::Keep, || true);
    done.stopped.map(|stopped| stopped.obstacle)
}

fn block() -> GpaRange {
    GpaRange::new(at(0), PageSize::Size2M.bytes())
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

#[test]
fn two_mappers_of_one_leaf_table_both_succeed() {
    check(|| {
        let table = table(6);
        assert_eq!(map(&table, 2, 102), None);
        let other = thread::spawn({
            let table = table.clone();
            move || map(&table, 0, 100)
        });
        assert_eq!(map(&table, 1, 101), None);
        assert_eq!(other.join().expect("no panic"), None);
        for page in 0..3 {
            assert_eq!(table.walk(at(page)).map(|leaf| leaf.pfn), Some(Pfn::new(100 + page)));
        }
        assert_eq!(table.leaves().size_4k, 3);
    });
}

#[test]
fn two_mappers_of_one_entry_agree_on_a_winner() {
    check(|| {
        let table = table(6);
        assert_eq!(map(&table, 1, 101), None);
        let other = thread::spawn({
            let table = table.clone();
            move || {
                assert_eq!(map(&table, 0, 7), None);
                table.walk(at(0)).map(|leaf| leaf.pfn)
            }
        });
        assert_eq!(map(&table, 0, 8), None);
        let mine = table.walk(at(0)).map(|leaf| leaf.pfn);
        assert_eq!(mine, other.join().expect("no panic"));
        assert_eq!(table.leaves().size_4k, 2);
    });
}

#[test]
fn a_mapping_is_in_the_tree_or_was_unmapped_with_its_parent() {
    check(|| {
        let table = table(8);
        assert_eq!(map(&table, 1, 101), None);
        let unmapper = thread::spawn({
            let table = table.clone();
            move || {
                let done = table.unmap(block(), Edges::Whole);
                let gone = done.leaves.size_4k;
                done.flush.complete(|_| ());
                gone
            }
        });
        let obstacle = map(&table, 0, 100);
        let gone = unmapper.join().expect("no panic");
        let there = u64::from(table.walk(at(0)).is_some());
        let mapped = u64::from(obstacle.is_none());
        assert!(matches!(obstacle, None | Some(Obstacle::Frozen)));
        assert_eq!(gone + there, 1 + mapped, "a mapping was lost");
        assert_eq!(table.leaves().size_4k, there);
    });
}

#[test]
fn a_checked_mapping_never_survives_an_invalidation() {
    check(|| {
        let table = table(8);
        // The tables above exist; the leaf table does not, so the two need not meet at a lock.
        let done = table.place(
            Gpa::new(PageSize::Size2M.bytes()),
            PageSize::Size2M,
            Pfn::new(512),
            all(),
            Present::Keep,
            || true,
        );
        assert!(done.stopped.is_none());
        drop(done);
        let invalid = Arc::new(AtomicBool::new(false));
        let unmapper = thread::spawn({
            let (table, invalid) = (table.clone(), invalid.clone());
            move || {
                invalid.store(true, Ordering::Relaxed);
                table.unmap(block(), Edges::Whole).flush.complete(|_| ());
            }
        });
        let valid = || !invalid.load(Ordering::Relaxed);
        let done = table.place(at(0), PageSize::Size4K, Pfn::new(0), all(), Present::Keep, valid);
        drop(done);
        unmapper.join().expect("no panic");
        assert_eq!(table.walk(at(0)), None, "a stale mapping survived");
    });
}

#[test]
fn a_split_against_a_mapper_loses_nothing() {
    check(|| {
        let table = table(8);
        let done = table.place(at(0), PageSize::Size2M, Pfn::new(0), all(), Present::Keep, || true);
        assert!(done.stopped.is_none());
        drop(done);
        let splitter = thread::spawn({
            let table = table.clone();
            move || {
                let done = table.split(block(), PageSize::Size4K);
                assert_eq!(done.stopped, None);
            }
        });
        let done = table.place(at(1), PageSize::Size4K, Pfn::new(1), all(), Present::Keep, || true);
        assert_eq!((done.stopped, done.mapped.total()), (None, 0));
        assert_eq!(table.walk(at(1)).and_then(|leaf| leaf.translate(at(1))), Some(Pfn::new(1).address()));
        drop(done);
        splitter.join().expect("no panic");
        assert_eq!(table.walk(at(1)).map(|leaf| leaf.page_size), Some(PageSize::Size4K));
    });
}

#[test]
fn a_split_keeps_what_the_processor_notes_meanwhile() {
    check(|| {
        let table = table(8);
        let done = table.place(at(0), PageSize::Size2M, Pfn::new(0), all(), Present::Keep, || true);
        assert!(done.stopped.is_none());
        drop(done);
        let processor = thread::spawn({
            let table = table.clone();
            move || table.view().access(at(1), Access::Write).is_ok()
        });
        drop(table.split(block(), PageSize::Size4K));
        assert!(processor.join().expect("no panic"));
        assert!(table.walk(at(1)).is_some_and(|leaf| leaf.attributes.used.dirty), "a write was forgotten");
    });
}

#[test]
fn a_change_keeps_what_the_processor_notes_meanwhile() {
    for change in [Change::ClearAccessed, Change::WriteProtect] {
        check(move || {
            let table = table(6);
            assert_eq!(map(&table, 1, 101), None);
            assert!(table.view().access(at(1), Access::Read).is_ok());
            let processor = thread::spawn({
                let table = table.clone();
                move || table.view().access(at(1), Access::Write).is_ok()
            });
            let page = GpaRange::new(at(1), PAGE_SIZE);
            drop(match change {
                Change::ClearAccessed => table.test_and_clear_accessed(page, |_| {}),
                Change::WriteProtect => table.write_protect(page, Edges::Whole),
            });
            let wrote = processor.join().expect("no panic");
            let leaf = table.walk(at(1)).expect("mapped");
            assert_eq!(leaf.attributes.used.dirty, wrote, "a write was forgotten");
            assert!(wrote || !leaf.writable());
        });
    }
}

#[derive(Clone, Copy)]
enum Change {
    ClearAccessed,
    WriteProtect,
}

#[test]
fn a_walker_sees_new_tables_whole() {
    for pages in [1, 2] {
        check(move || {
            let table = table(8);
            let walker = thread::spawn({
                let table = table.clone();
                move || table.walk(at(1)).map(|leaf| leaf.pfn)
            });
            // One page is put in an empty table that is linked and locked; two are in theirs before it is linked.
            if pages == 1 {
                assert_eq!(map(&table, 1, 101), None);
            } else {
                let range = GpaRange::new(at(0), pages * PAGE_SIZE);
                let done = table.map(range, Pfn::new(100), all(), PageSize::Size4K, Present::Keep);
                assert_eq!((done.stopped, done.mapped.size_4k), (None, pages));
            }
            assert!(walker.join().expect("no panic").is_none_or(|pfn| pfn == Pfn::new(101)));
        });
    }
}

#[test]
fn nothing_is_mapped_anew_before_the_flush_is_done() {
    for range in [block(), GpaRange::new(at(1), PAGE_SIZE)] {
        check(move || {
            let table = table(8);
            assert_eq!((map(&table, 0, 100), map(&table, 1, 101)), (None, None));
            let flushed = Arc::new(UnsafeCell::new(0_u8));
            let mapper = thread::spawn({
                let (table, flushed) = (table.clone(), Shared(flushed.clone()));
                move || {
                    let flushed = flushed;
                    let done =
                        table.place(at(1), PageSize::Size4K, Pfn::new(7), all(), Present::Keep, || true);
                    if done.mapped.total() == 1 {
                        // SAFETY: loom checks that nobody writes the cell meanwhile.
                        flushed.0.with(|done| assert_eq!(unsafe { *done }, 1));
                    }
                }
            });
            table.unmap(range, Edges::Whole).flush.complete(|_| {
                // SAFETY: loom checks that nobody else is in the cell.
                flushed.with_mut(|done| unsafe { *done = 1 });
            });
            mapper.join().expect("no panic");
        });
    }
}

#[test]
fn a_table_is_not_freed_under_a_walker() {
    check(|| {
        let table = table(8);
        assert_eq!(map(&table, 1, 101), None);
        let walker = thread::spawn({
            let table = table.clone();
            move || {
                let found = table.walk(at(1)).map(|leaf| leaf.pfn);
                assert!(matches!(found, None | Some(_)) && found.is_none_or(|pfn| pfn == Pfn::new(101)));
            }
        });
        table.unmap(block(), Edges::Whole).flush.complete(|_| ());
        table.collect();
        walker.join().expect("no panic");
        table.collect();
    });
}

#[test]
fn a_flush_by_waiting_outlasts_every_access() {
    check(|| {
        let table = table(8);
        assert_eq!(map(&table, 1, 101), None);
        let memory = Arc::new(UnsafeCell::new(0_u8));
        let guest = thread::spawn({
            let (table, memory) = (table.clone(), Shared(memory.clone()));
            move || {
                let memory = memory;
                let view = table.view();
                if view.access(at(1), Access::Write).is_ok() {
                    // SAFETY: loom checks that nobody else is in the cell.
                    memory.0.with_mut(|byte| unsafe { *byte = 1 });
                }
            }
        });
        table.unmap(block(), Edges::Whole).flush.complete_by_waiting();
        // The page is the host's again.
        // SAFETY: loom checks that nobody else is in the cell.
        memory.with_mut(|byte| unsafe { *byte = 2 });
        guest.join().expect("no panic");
    });
}

struct Shared(Arc<UnsafeCell<u8>>);
// SAFETY: loom checks each access to the cell.
unsafe impl Send for Shared {}

/// Refuses the leaf of page 0, and checks that the others are told in order.
#[derive(Default)]
struct Refusing {
    told: loom::sync::Mutex<Vec<u64>>,
}

impl Mirror for Refusing {
    type Refusal = &'static str;

    fn link_table(&self, _: Gpa, _: u8, _: Pfn) -> Result<(), Self::Refusal> {
        Ok(())
    }

    fn set_leaf(&self, gpa: Gpa, _: PageSize, _: Pfn) -> Result<(), Self::Refusal> {
        if gpa == at(0) {
            return Err("not this one");
        }
        self.told.lock().expect("no panic").push(gpa.frame().number());
        Ok(())
    }

    fn remove_leaf(&self, gpa: Gpa, _: PageSize, _: Pfn) -> Result<(), Self::Refusal> {
        self.told.lock().expect("no panic").retain(|page| *page != gpa.frame().number());
        Ok(())
    }

    fn remove_table(&self, _: Gpa, _: u8, _: Pfn) -> Result<(), Self::Refusal> {
        Ok(())
    }
}

#[test]
fn a_refusal_leaves_both_tables_as_they_were() {
    check(|| {
        let table: Table<Refusing> =
            PageTable::with_mirror(Watched::new(8), Levels::Four, Refusing::default()).expect("a frame");
        let table = Arc::new(table);
        let place = |table: &Table<Refusing>, page| {
            let done = table.place(at(page), PageSize::Size4K, Pfn::new(page), all(), Present::Keep, || true);
            done.stopped.map(|stopped| stopped.obstacle)
        };
        assert_eq!(place(&table, 2), None);
        let other = thread::spawn({
            let table = table.clone();
            move || {
                assert_eq!(place(&table, 0), Some(Obstacle::Refused("not this one")));
                assert_eq!(table.walk(at(0)), None);
            }
        });
        assert_eq!(place(&table, 1), None);
        assert_eq!(table.walk(at(0)), None, "a refused leaf was seen");
        // What our table maps the mirror maps.
        assert!(table.mirror().told.lock().expect("no panic").contains(&1));
        other.join().expect("no panic");
        assert_eq!(table.leaves().size_4k, 2);
    });
}
