//! Four threads at once: what each is told can be put in one order that a plain map agrees with.
//!
//! Operations of single pages by four threads on a few pages, with the moments at which each began and ended. An order is
//! searched that keeps each operation after all that ended before it began, and in which a map of pages gives each the
//! answer it got. Pages are searched one by one: linearizability is local, so a history is linearizable if its part on
//! each page is.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use premap_mmu::{
    Access, Attributes, Edges, Ept, Gpa, GpaRange, Heap, Levels, Obstacle, PAGE_SIZE, PageSize, PageTable,
    Permissions, Pfn, Present,
};

const THREADS: u64 = 4;
const PAGES: u64 = 3;
const STEPS: usize = 6;
const ROUNDS: u64 = if cfg!(debug_assertions) { 1_000 } else { 4_000 };

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Maps to a frame; told whether nothing was there.
    Map(u64),
    /// Told whether it was there.
    Unmap,
    /// Told the frame.
    Walk,
    /// Told whether it was writable.
    WriteProtect,
    /// Told whether it may be written.
    Write,
}

/// What an operation was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Yes(bool),
    Frame(Option<u64>),
    /// A flush was owed: no answer, so nothing to put in order.
    Busy,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    page: u64,
    op: Op,
    told: Told,
    began: u64,
    ended: u64,
}

/// A page: its frame, and whether it may be written.
type State = Option<(u64, bool)>;

fn sequential(state: State, op: Op) -> (State, Told) {
    match (op, state) {
        (Op::Map(pfn), None) => (Some((pfn, true)), Told::Yes(true)),
        (Op::Map(_), state) => (state, Told::Yes(false)),
        (Op::Unmap, state) => (None, Told::Yes(state.is_some())),
        (Op::Walk, state) => (state, Told::Frame(state.map(|(pfn, _)| pfn))),
        (Op::WriteProtect, Some((pfn, writable))) => (Some((pfn, false)), Told::Yes(writable)),
        (Op::WriteProtect, None) => (None, Told::Yes(false)),
        (Op::Write, state) => (state, Told::Yes(state.is_some_and(|(_, writable)| writable))),
    }
}

/// Whether the events that are not yet `done` can follow in some order.
fn orders(
    events: &[Event],
    done: u32,
    state: State,
    seen: &mut std::collections::HashSet<(u32, State)>,
) -> bool {
    if done.count_ones() as usize == events.len() {
        return true;
    }
    if !seen.insert((done, state)) {
        return false;
    }
    let left = || (0..events.len()).filter(|at| done & 1 << at == 0);
    let first_end = left().map(|at| events[at].ended).min().expect("some are left");
    left().any(|at| {
        let event = events[at];
        let (next, told) = sequential(state, event.op);
        event.began <= first_end && told == event.told && orders(events, done | 1 << at, next, seen)
    })
}

struct World {
    table: PageTable<Ept, Heap>,
    clock: AtomicU64,
}

impl World {
    fn run(&self, page: u64, op: Op) -> Event {
        let gpa = Gpa::new(page * PAGE_SIZE);
        let range = GpaRange::new(gpa, PAGE_SIZE);
        let began = self.clock.fetch_add(1, Ordering::SeqCst);
        let told = match op {
            Op::Map(pfn) => {
                let attributes = Attributes::new(Permissions::READ_WRITE);
                let present = Present::Keep;
                let done =
                    self.table.place(gpa, PageSize::Size4K, Pfn::new(pfn), attributes, present, || true);
                match done.stopped {
                    Some(stopped) => {
                        assert_eq!(stopped.obstacle, Obstacle::Frozen);
                        Told::Busy
                    }
                    None => Told::Yes(done.mapped.total() == 1),
                }
            }
            Op::Unmap => {
                let done = self.table.unmap(range, Edges::Whole);
                done.flush.complete(|_| ());
                Told::Yes(done.leaves.total() == 1)
            }
            Op::Walk => Told::Frame(self.table.walk(gpa).map(|leaf| leaf.pfn.number())),
            Op::WriteProtect => {
                let done = self.table.write_protect(range, Edges::Whole);
                done.flush.complete(|_| ());
                Told::Yes(done.leaves.total() == 1)
            }
            Op::Write => Told::Yes(self.table.view().access(gpa, Access::Write).is_ok()),
        };
        let ended = self.clock.fetch_add(1, Ordering::SeqCst);
        Event { page, op, told, began, ended }
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn the_answers_of_four_threads_can_be_put_in_order() {
    let mut overlapping = 0;
    for round in 0..ROUNDS {
        let table = PageTable::new(Heap, Levels::Four).expect("a frame");
        let world = World { table, clock: AtomicU64::new(0) };
        let barrier = Barrier::new(usize::try_from(THREADS).expect("few"));
        let events: Vec<Event> = std::thread::scope(|scope| {
            let thread = |thread: u64| {
                let (world, barrier) = (&world, &barrier);
                scope.spawn(move || {
                    let mut seed = (round + 1) * 0x9e37_79b9 + thread * 0x1234_5677 + 1;
                    barrier.wait();
                    let step = |_| {
                        let choice = random(&mut seed);
                        let op = match choice >> 8 & 7 {
                            0..=2 => Op::Map(thread * 100 + (choice >> 16 & 63)),
                            3 | 4 => Op::Unmap,
                            5 => Op::Walk,
                            6 => Op::WriteProtect,
                            _ => Op::Write,
                        };
                        world.run(choice % PAGES, op)
                    };
                    (0..STEPS).map(step).collect::<Vec<_>>()
                })
            };
            let handles: Vec<_> = (0..THREADS).map(thread).collect();
            handles.into_iter().flat_map(|handle| handle.join().expect("no panic")).collect()
        });
        for page in 0..PAGES {
            let own: Vec<Event> = events
                .iter()
                .copied()
                .filter(|event| event.page == page && event.told != Told::Busy)
                .collect();
            let overlaps = |a: &Event| own.iter().any(|b| a.began < b.began && b.began < a.ended);
            overlapping += own.iter().filter(|event| overlaps(event)).count();
            let ordered = orders(&own, 0, None, &mut std::collections::HashSet::new());
            assert!(ordered, "no order explains round {round}, page {page}: {own:#?}");
        }
        let everything = GpaRange::new(Gpa::new(0), PAGES * PAGE_SIZE);
        assert_eq!(world.table.leaves(), world.table.query(everything));
    }
    assert!(overlapping > 0, "the threads never met: nothing was tested");
}

#[test]
fn the_checker_refuses_what_no_order_explains() {
    let event = |op, told, began, ended| Event { page: 0, op, told, began, ended };
    let check = |events: &[Event]| orders(events, 0, None, &mut std::collections::HashSet::new());
    let mapped = event(Op::Map(7), Told::Yes(true), 0, 1);
    assert!(check(&[mapped, event(Op::Walk, Told::Frame(Some(7)), 2, 3)]));
    assert!(!check(&[mapped, event(Op::Walk, Told::Frame(None), 2, 3)]));
    assert!(check(&[event(Op::Map(7), Told::Yes(true), 0, 3), event(Op::Walk, Told::Frame(None), 1, 2)]));
    assert!(!check(&[mapped, event(Op::Map(8), Told::Yes(true), 0, 3)]));
}
