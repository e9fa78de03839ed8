//! Operations of single pages on a few pages. Pages are searched one by one: linearizability is local, so a history is
//! linearizable if its part on each page is.

use premap_mmu::{
    Access, Attributes, Edges, Ept, Gpa, GpaRange, Heap, Levels, Obstacle, PAGE_SIZE, PageSize, PageTable,
    Permissions, Pfn, Present,
};

use super::order::{Event, History, Machine, Next, explains, meetings, show};
use super::{Clock, Random, at_once};

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

/// One page.
struct Page;

impl Machine for Page {
    type Op = Op;
    type Told = Told;
    /// Its frame, and whether it may be written.
    type State = Option<(u64, bool)>;
    type Progress = ();

    fn moment(state: &mut Self::State, _: usize, op: &Op, (): &()) -> Option<Next<(), Told>> {
        Some(Next::Ends(match (*op, &mut *state) {
            (Op::Map(pfn), None) => {
                *state = Some((pfn, true));
                Told::Yes(true)
            }
            (Op::Map(_), Some(_)) => Told::Yes(false),
            (Op::Unmap, state) => Told::Yes(state.take().is_some()),
            (Op::Walk, state) => Told::Frame(state.map(|(pfn, _)| pfn)),
            (Op::WriteProtect, Some((_, writable))) => Told::Yes(std::mem::replace(writable, false)),
            (Op::WriteProtect, None) => Told::Yes(false),
            (Op::Write, state) => Told::Yes(state.is_some_and(|(_, writable)| writable)),
        }))
    }
}

fn run(table: &PageTable<Ept, Heap>, page: u64, op: Op) -> Told {
    let gpa = Gpa::new(page * PAGE_SIZE);
    let range = GpaRange::new(gpa, PAGE_SIZE);
    match op {
        Op::Map(pfn) => {
            let attributes = Attributes::new(Permissions::READ_WRITE);
            let done = table.place(gpa, PageSize::Size4K, Pfn::new(pfn), attributes, Present::Keep, || true);
            match done.stopped {
                Some(stopped) => {
                    assert_eq!(stopped.obstacle, Obstacle::Frozen);
                    Told::Busy
                }
                None => Told::Yes(done.mapped.total() == 1),
            }
        }
        Op::Unmap => {
            let done = table.unmap(range, Edges::Whole);
            done.flush.complete(|_| ());
            Told::Yes(done.leaves.total() == 1)
        }
        Op::Walk => Told::Frame(table.walk(gpa).map(|leaf| leaf.pfn.number())),
        Op::WriteProtect => {
            let done = table.write_protect(range, Edges::Whole);
            done.flush.complete(|_| ());
            Told::Yes(done.leaves.total() == 1)
        }
        Op::Write => Told::Yes(table.view().access(gpa, Access::Write).is_ok()),
    }
}

fn choose(thread: usize, random: &mut Random) -> Op {
    match random.below(8) {
        0..=2 => Op::Map(thread as u64 * 100 + random.below(64)),
        3 | 4 => Op::Unmap,
        5 => Op::Walk,
        6 => Op::WriteProtect,
        _ => Op::Write,
    }
}

#[test]
fn answers_about_pages_can_be_put_in_order() {
    let mut met = 0;
    for round in 0..ROUNDS {
        let table = PageTable::new(Heap, Levels::Four).expect("a frame");
        let clock = Clock::default();
        let threads = at_once(round, STEPS, |thread, random: &mut Random| {
            let page = random.below(PAGES);
            (page, clock.time(choose(thread, random), |op| run(&table, page, *op)))
        });
        for page in 0..PAGES {
            let of_page = |(own, event): &(u64, Event<Op, Told>)| (*own == page).then_some(*event);
            let told = |event: &Event<Op, Told>| event.told != Told::Busy;
            let thread = |steps: &Vec<_>| steps.iter().filter_map(of_page).filter(told).collect();
            let own: History<Page> = threads.iter().map(thread).collect();
            met += meetings(&own);
            let explained = explains::<Page>(&own, None);
            assert!(explained, "no order explains round {round}, page {page}:\n{}", show(&own));
        }
        let everything = GpaRange::new(Gpa::new(0), PAGES * PAGE_SIZE);
        assert_eq!(table.leaves(), table.query(everything));
    }
    assert!(met > 0, "the threads never met: nothing was tested");
}

#[test]
fn what_no_order_explains_about_a_page_is_refused() {
    let event = |op, told, began, ended| Event { op, told, began, ended };
    let check = |first, second| explains::<Page>(&vec![vec![first], vec![second]], None);
    let mapped = event(Op::Map(7), Told::Yes(true), 0, 1);
    assert!(check(mapped, event(Op::Walk, Told::Frame(Some(7)), 2, 3)));
    assert!(!check(mapped, event(Op::Walk, Told::Frame(None), 2, 3)));
    assert!(check(event(Op::Map(7), Told::Yes(true), 0, 3), event(Op::Walk, Told::Frame(None), 1, 2)));
    assert!(!check(mapped, event(Op::Map(8), Told::Yes(true), 0, 3)));
}
