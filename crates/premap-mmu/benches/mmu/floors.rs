//! Floors: the bare work, without what makes it a page table that others can use.
// UNSAFETY: the floors are raw stores to raw frames; that is what they are there to measure.
#![expect(unsafe_code, reason = "raw stores to raw frames are what a floor is")]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use premap_mmu::{Arena, FrameAllocator, Pfn};

use crate::harness::{PAGE, PAGES, Run, Sink, World, time};

const LEVELS_LOCK_FREE: &str = "floor: 4 levels, lock-free";
const CURSOR_LOCK_FREE: &str = "floor: cursor, cmpxchg an entry";
const CURSOR_LOCK: &str = "floor: cursor, a lock a table";
const RANGE_FILL: &str = "floor: 4 levels, range fill";
const FLAT: &str = "floor: flat array";

pub(crate) const RUNS: &[Run] = &[
    ("floor flat", flat),
    ("floor levels", levels),
    ("floor random", random),
    ("floor cursor lock free", cursor_lock_free),
    ("floor cursor lock", cursor_lock),
    ("floor range fill", range_fill),
];

type Entries = [AtomicU64; 512];
const PRESENT: u64 = 7;

/// A new table of zeroes.
fn empty(arena: &Arena) -> Pfn {
    let frame = arena.allocate().expect("the arena has room");
    // SAFETY: the frame was allocated just now, so it is 4 KiB that nobody else uses.
    unsafe { arena.pointer(frame).cast::<u8>().write_bytes(0, 4096) };
    frame
}

fn entries(arena: &Arena, frame: Pfn) -> &Entries {
    // SAFETY: frames of the arena live as long as it does, and these are only used as 512 atomic words.
    unsafe { arena.pointer(frame).cast::<Entries>().as_ref() }
}

struct Tree<'a> {
    arena: &'a Arena,
    root: &'a Entries,
}

impl<'a> Tree<'a> {
    fn new(arena: &'a Arena) -> Self {
        Self { arena, root: entries(arena, empty(arena)) }
    }

    /// Walks down to a leaf table, making what is missing with an exchange.
    fn leaf_table(&self, page: u64) -> &'a Entries {
        let mut table = self.root;
        for level in (1..4).rev() {
            let entry = &table[index(page, level)];
            let mut raw = entry.load(Ordering::Acquire);
            if raw == 0 {
                let new = empty(self.arena).address().raw() | PRESENT;
                raw = match entry.compare_exchange(0, new, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => new,
                    Err(other) => other,
                };
            }
            table = entries(self.arena, Pfn::new(raw >> 12));
        }
        table
    }
}

const fn index(page: u64, level: u32) -> usize {
    ((page >> (9 * level)) & 511) as usize
}

fn exchange(entry: &AtomicU64, page: u64) {
    let raw = (page * PAGE) | PRESENT;
    entry.compare_exchange(0, raw, Ordering::AcqRel, Ordering::Relaxed).expect("nothing is there");
}

fn flat(_: &mut World, sink: &mut Sink) {
    let present = black_box(PRESENT);
    let array: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(1)).collect();
    let (figure, ()) = time(|| {
        for (page, entry) in (0..).zip(&array) {
            entry.store((page * PAGE) | present, Ordering::Release);
        }
    });
    sink.note("range_map", FLAT, 1, figure);
}

fn levels(world: &mut World, sink: &mut Sink) {
    let tree = Tree::new(&world.arena);
    let walk = || (0..PAGES).for_each(|page| exchange(&tree.leaf_table(page)[index(page, 0)], page));
    sink.note("cursor_map", LEVELS_LOCK_FREE, 1, time(walk).0);
    let unmap = || {
        (0..PAGES).for_each(|page| {
            let raw = (page * PAGE) | PRESENT;
            let entry = &tree.leaf_table(page)[index(page, 0)];
            entry.compare_exchange(raw, 0, Ordering::AcqRel, Ordering::Relaxed).expect("it is there");
        });
    };
    sink.note("unmap", LEVELS_LOCK_FREE, 1, time(unmap).0);
}

fn random(world: &mut World, sink: &mut Sink) {
    let tree = Tree::new(&world.arena);
    let map = || world.random.iter().for_each(|&page| exchange(&tree.leaf_table(page)[index(page, 0)], page));
    sink.note("random_map", LEVELS_LOCK_FREE, 1, time(map).0);
    let query = || {
        let present =
            |page: u64| tree.leaf_table(page)[index(page, 0)].load(Ordering::Acquire) & PRESENT != 0;
        world.random.iter().filter(|page| present(**page)).count()
    };
    let (figure, found) = time(query);
    assert_eq!(found, world.random.len());
    sink.note("random_query", LEVELS_LOCK_FREE, 1, figure);
}

fn cursor_lock_free(world: &mut World, sink: &mut Sink) {
    let tree = Tree::new(&world.arena);
    let (figure, ()) = time(|| {
        let mut table = tree.root;
        for page in 0..PAGES {
            if index(page, 0) == 0 {
                table = tree.leaf_table(page);
            }
            exchange(&table[index(page, 0)], page);
        }
    });
    sink.note("cursor_map", CURSOR_LOCK_FREE, 1, figure);
}

fn cursor_lock(world: &mut World, sink: &mut Sink) {
    let tree = Tree::new(&world.arena);
    let present = black_box(PRESENT);
    let lock = AtomicBool::new(false);
    let (figure, ()) = time(|| {
        let mut table = tree.root;
        for page in 0..PAGES {
            if index(page, 0) == 0 {
                lock.store(false, Ordering::Release);
                table = tree.leaf_table(page);
                while lock.swap(true, Ordering::Acquire) {}
            }
            let entry = &table[index(page, 0)];
            assert_eq!(entry.load(Ordering::Relaxed), 0);
            entry.store((page * PAGE) | present, Ordering::Release);
        }
    });
    sink.note("cursor_map", CURSOR_LOCK, 1, figure);
}

fn range_fill(world: &mut World, sink: &mut Sink) {
    let tree = Tree::new(&world.arena);
    let (figure, ()) = time(|| {
        let mut page = 0;
        while page < PAGES {
            let count = (512 - index(page, 0) as u64).min(PAGES - page);
            let table = tree.leaf_table(page);
            for (page, entry) in (page..page + count).zip(&table[index(page, 0)..]) {
                entry.store((page * PAGE) | PRESENT, Ordering::Release);
            }
            page += count;
        }
    });
    sink.note("range_map", RANGE_FILL, 1, figure);
    let (figure, sum) = time(|| {
        let mut sum = 0;
        for page in (0..PAGES).step_by(512) {
            let entries = &tree.leaf_table(page)[..];
            sum += entries.iter().map(|entry| entry.load(Ordering::Acquire) >> 12).sum::<u64>();
        }
        sum
    });
    assert_eq!(sum, PAGES * (PAGES - 1) / 2);
    sink.note("range_query", RANGE_FILL, 1, figure);
    let (figure, ()) = time(|| {
        for page in (0..PAGES).step_by(512) {
            tree.leaf_table(page).iter().for_each(|entry| entry.store(0, Ordering::Release));
        }
    });
    sink.note("unmap", RANGE_FILL, 1, figure);
}
