//! The protocol under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p premap-mmu --release --test loom`.
//!
//! The models run the crate's own code. Tables have four entries here, and the allocator tracks each frame's life with a
//! loom cell: following a table entry reads the cell, giving the frame back writes it, so a walker that is not ordered
//! before the free is found whatever the memory holds.
#![cfg(loom)]
// UNSAFETY: an allocator that watches its frames, and cells that loom checks.
#![expect(unsafe_code, reason = "the allocator trait and loom's cells are unsafe")]

use std::ptr::NonNull;
use std::sync::Arc as StdArc;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use premap_mmu::{
    Attributes, Edges, Ept, FrameAllocator, Gpa, GpaRange, Heap, Levels, Mirror, NoMirror, Obstacle,
    PAGE_SIZE, PageSize, PageTable, Permissions, Pfn, Present,
};

/// Frames that loom watches: a fixed few, each with a cell.
struct Watched {
    frames: Vec<(Pfn, UnsafeCell<bool>)>,
    next: loom::sync::Mutex<usize>,
}

// SAFETY: the cells are there to be raced on under loom's eyes; the frames behind them are Heap's.
unsafe impl Send for Watched {}
// SAFETY: as for `Send`.
unsafe impl Sync for Watched {}

impl Watched {
    fn new(frames: usize) -> StdArc<Self> {
        let frames = (0..frames).map(|_| (Heap.allocate().expect("memory"), UnsafeCell::new(false)));
        StdArc::new(Self { frames: frames.collect(), next: loom::sync::Mutex::new(0) })
    }

    fn life(&self, frame: Pfn) -> &UnsafeCell<bool> {
        &self.frames.iter().find(|(own, _)| *own == frame).expect("a frame of ours").1
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        for (frame, _) in &self.frames {
            // SAFETY: the tables are gone before their allocator.
            unsafe { Heap.free(*frame) };
        }
    }
}

// SAFETY: the frames are Heap's, each given out once.
unsafe impl FrameAllocator for Watched {
    fn allocate(&self) -> Option<Pfn> {
        let mut next = self.next.lock().expect("no panics");
        let (frame, _) = self.frames.get(*next)?;
        *next += 1;
        Some(*frame)
    }

    unsafe fn free(&self, frame: Pfn) {
        // SAFETY: loom checks that nobody else is in the cell.
        self.life(frame).with_mut(|freed| unsafe { *freed = true });
    }

    fn pointer(&self, frame: Pfn) -> NonNull<premap_mmu::frames::TablePage> {
        // SAFETY: loom checks that nobody writes the cell meanwhile.
        self.life(frame).with(|freed| assert!(!unsafe { *freed }, "a freed table is reached"));
        Heap.pointer(frame)
    }
}

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
            move || table.view().access(at(1), premap_mmu::Access::Write).is_ok()
        });
        drop(table.split(block(), PageSize::Size4K));
        assert!(processor.join().expect("no panic"));
        assert!(table.walk(at(1)).is_some_and(|leaf| leaf.attributes.used.dirty), "a write was forgotten");
    });
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
                if view.access(at(1), premap_mmu::Access::Write).is_ok() {
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
