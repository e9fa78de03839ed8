//! premap's own page table.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use premap_mmu::{
    Arena, Attributes, Edges, Ept, FrameAllocator, Gpa, GpaRange, Levels, PageSize, PageTable, Permissions,
    Pfn, Present,
};

use crate::harness::{PAGE, PAGES, Run, Sink, World, a_page, time};
use crate::pools::Pools;

const NAME: &str = "premap";
/// How often threads repeat their work in a round: each time is a fraction of a millisecond.
const PASSES: usize = 32;
/// Frames for tables of all pages, in each pool's share.
const FRAMES: usize = 2_100;
/// What one leaf table maps.
const BLOCK: u64 = PageSize::Size2M.bytes();

pub(crate) const RUNS: &[Run] = &[
    ("premap range", range),
    ("premap cursor", cursor),
    ("premap random", random),
    ("premap random cursor", random_cursor),
    ("premap single", random_single),
    ("premap blocks", |world, sink| threads(world, sink, "range_map_blocks", blocks)),
    ("premap interleaved", |world, sink| threads(world, sink, "range_map_interleaved", interleaved)),
];

type Table<'a> = PageTable<Ept, &'a Arena>;
/// What one of several threads does: the table, the thread's number, and how many there are.
type Share = fn(&PageTable<Ept, Pools<'_>>, u64, u64);

fn table(arena: &Arena) -> Table<'_> {
    PageTable::new(arena, Levels::Four).expect("the arena has room")
}

fn attributes() -> Attributes<Ept> {
    Attributes::new(black_box(Permissions::ALL))
}

fn map<A: FrameAllocator>(table: &PageTable<Ept, A>, first: u64, bytes: u64) {
    let range = GpaRange::new(Gpa::new(first), bytes);
    let pfn = Pfn::new(first / PAGE);
    let done = table.map(range, pfn, attributes(), PageSize::Size4K, Present::Keep);
    assert!(done.stopped.is_none() && done.mapped.size_4k == bytes / PAGE);
}

fn range(world: &mut World, sink: &mut Sink) {
    let table = table(&world.arena);
    let whole = GpaRange::new(Gpa::new(0), PAGES * PAGE);
    sink.note("range_map", NAME, 1, time(|| map(&table, 0, whole.bytes())).0);
    let (figure, pages) = time(|| {
        let mut pages = 0;
        table.stretches(black_box(whole), |stretch| pages += black_box(stretch).range.pages());
        pages
    });
    assert_eq!(pages, PAGES);
    sink.note("range_query", NAME, 1, figure);
    let (figure, sum) = time(|| {
        let mut sum = 0;
        table.for_each(black_box(whole), |leaf| sum += leaf.pfn.number());
        sum
    });
    assert_eq!(sum, PAGES * (PAGES - 1) / 2);
    sink.note("range_query", "premap, each leaf", 1, figure);
    let (figure, leaves) = time(|| {
        let gone = table.unmap(black_box(whole), Edges::Whole);
        gone.flush.complete(|_| ());
        gone.leaves.size_4k
    });
    assert_eq!(leaves, PAGES);
    sink.note("unmap", NAME, 1, figure);
}

fn cursor(world: &mut World, sink: &mut Sink) {
    let table = table(&world.arena);
    let attributes = attributes();
    let (figure, ()) = time(|| {
        let mut cursor = table.cursor(Present::Keep);
        for page in 0..PAGES {
            cursor.map(Gpa::new(page * PAGE), Pfn::new(page), attributes).expect("nothing is there");
        }
    });
    sink.note("cursor_map", NAME, 1, figure);
    //assert_eq!(table.leaves().size_4k, PAGES);
}

fn random(world: &mut World, sink: &mut Sink) {
    let table = table(&world.arena);
    let (figure, mapped) = time(|| {
        let pages = world.random.iter().map(|&page| (Gpa::new(page * PAGE), Pfn::new(page)));
        table.map_scattered(pages, attributes(), Present::Keep).mapped.size_4k
    });
    sink.note("random_map", NAME, 1, figure);
    assert_eq!((mapped, table.leaves().size_4k), (PAGES, PAGES));
}

fn random_cursor(world: &mut World, sink: &mut Sink) {
    let table = table(&world.arena);
    let (figure, ()) = time(|| {
        let mut cursor = table.cursor(Present::Keep);
        for &page in &world.random {
            cursor.map(Gpa::new(page * PAGE), Pfn::new(page), attributes()).expect("nothing is there");
        }
    });
    sink.note("random_map", "premap, cursor", 1, figure);
    //assert_eq!(table.leaves().size_4k, PAGES);
    let (figure, found) = time(|| {
        let view = table.view();
        world.random.iter().filter(|page| view.walk(Gpa::new(**page * PAGE)).is_some()).count()
    });
    assert_eq!(found, world.random.len());
    sink.note("random_query", NAME, 1, figure);
}

/// As a fault handler maps: each page a call of its own with its own check, and nothing kept between.
fn random_single(world: &mut World, sink: &mut Sink) {
    let table = table(&world.arena);
    let (figure, ()) = time(|| {
        for &page in &world.random {
            let gpa = Gpa::new(page * PAGE);
            let done =
                table.place(gpa, PageSize::Size4K, Pfn::new(page), attributes(), Present::Keep, || {
                    black_box(true)
                });
            assert!(done.stopped.is_none());
        }
    });
    sink.note("random_map", "premap, a call a page", 1, figure);
}

/// Each thread maps one half.
fn blocks(table: &PageTable<Ept, Pools<'_>>, thread: u64, threads: u64) {
    let share = (PAGES * PAGE / threads).next_multiple_of(BLOCK);
    let start = thread * share;
    map(table, start, share.min(PAGES * PAGE - start));
}

/// The threads take turns, one block of 2 MiB each: neighbouring blocks, whose entries share cache lines.
fn interleaved(table: &PageTable<Ept, Pools<'_>>, thread: u64, threads: u64) {
    let mut start = thread * BLOCK;
    while start < PAGES * PAGE {
        map(table, start, BLOCK.min(PAGES * PAGE - start));
        start += threads * BLOCK;
    }
}

fn threads(world: &mut World, sink: &mut Sink, bench: &'static str, share: Share) {
    for threads in [1, 2].repeat(PASSES) {
        world.arena.reset();
        let pools = Pools::new(&world.arena, FRAMES, threads);
        let table = PageTable::new(pools, Levels::Four).expect("the pool has room");
        // They spin at the start: a sleeper's wake-up would take as long as the whole work.
        let ready = AtomicUsize::new(0);
        let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
            let run = |thread: usize| {
                let (table, ready) = (&table, &ready);
                scope.spawn(move || {
                    table.frames().enter(thread);
                    ready.fetch_add(1, Ordering::SeqCst);
                    while ready.load(Ordering::SeqCst) < threads {
                        std::hint::spin_loop();
                    }
                    let start = Instant::now();
                    share(table, thread as u64, threads as u64);
                    (start, Instant::now())
                })
            };
            let handles: Vec<_> = (0..threads).map(run).collect();
            handles.into_iter().map(|handle| handle.join().expect("it does not panic")).collect()
        });
        let start = spans.iter().map(|span| span.0).min().expect("a thread");
        let end = spans.iter().map(|span| span.1).max().expect("a thread");
        sink.note(bench, NAME, threads, a_page(end - start));
        //assert_eq!(table.leaves().size_4k, PAGES);
    }
}
