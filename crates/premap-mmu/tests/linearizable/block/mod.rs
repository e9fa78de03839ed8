//! Every operation of the crate on one block of 2 MiB.
//!
//! Where an operation calls back (to check, to ask for a leaf, to tell, to flush) it lets other threads run now and then,
//! so that they meet it with the lock held, half way through, and with its flush owed.

mod machine;
mod mapping;
mod op;

use premap_mmu::{
    Access, AccessFault, Arm64Stage2, Attributes, Changed, Edges, Ept, Format, Gpa, GpaRange, Heap, Levels,
    Mapped, Mapping, NoMirror, Obstacle, PAGE_SIZE, PageSize, PageTable, Permissions, Pfn, Present, Stopped,
    TracksUse, Use,
};

use self::machine::{OneBlock, State};
use self::op::{BLOCK, Change, New, Op, PAGES, Part, Stop, Told};
use super::order::{Event, History, explains, meetings, show};
use super::{Clock, Random, at_once};

const STEPS: usize = 8;
const ROUNDS: u64 = 4_000;

/// The block's first page.
const FIRST: u64 = 2 * BLOCK;
/// The runs of frames to map.
const RUNS: [Pfn; 2] = [Pfn::new(16 * BLOCK), Pfn::new(23 * BLOCK)];

/// What was told can't be put in cells: the operation met one half way.
#[derive(Debug)]
struct HalfWay;

type Answer = Result<Told, HalfWay>;

struct World<'w, F: TracksUse> {
    table: &'w PageTable<F, Heap>,
    random: Random,
}

fn address(cell: usize) -> Gpa {
    Gpa::new((FIRST + cell as u64) * PAGE_SIZE)
}

fn range(part: Part) -> GpaRange {
    let pages = PAGES[part.cells()].iter().sum::<u64>();
    GpaRange::new(address(part.cells().start), pages * PAGE_SIZE)
}

fn frame(run: Pfn, gpa: Gpa) -> Pfn {
    Pfn::new(run.number() + gpa.frame().number() - FIRST)
}

/// The leaf of an address as the model spells it.
fn leaf<F: TracksUse>(found: Mapping<F>, gpa: Gpa) -> u64 {
    let frame = found.translate(gpa).expect("it maps the address").frame();
    let run = Pfn::new(frame.number() - (gpa.frame().number() - FIRST));
    F::leaf(run, PageSize::Size4K, found.attributes)
}

fn stop<R>(stopped: Option<Stopped<R>>) -> Result<Option<(usize, Stop)>, HalfWay> {
    let Some(Stopped { gpa, obstacle }) = stopped else { return Ok(None) };
    let cell = (0..3).find(|cell| address(*cell) == gpa);
    match obstacle {
        Obstacle::Frozen => Ok(Some((cell.ok_or(HalfWay)?, Stop::Frozen))),
        Obstacle::Conflict => Ok(Some((cell.expect("all of a run or nothing of it"), Stop::Conflict))),
        _ => panic!("nothing else is in the way"),
    }
}

impl<F: TracksUse> World<'_, F> {
    /// Lets another thread run, once in so many times.
    fn pause(random: &mut Random, once_in: u64) {
        if random.below(once_in) == 0 {
            std::thread::yield_now();
        }
    }

    fn mapped(&mut self, done: Mapped<'_, F, Heap, NoMirror>) -> Answer {
        done.flush.complete(|_| Self::pause(&mut self.random, 2));
        Ok(Told {
            came: done.mapped.pages(),
            gave_way: done.replaced.pages(),
            changed: done.rebuilt.pages(),
            spurious: done.spurious,
            stopped: stop(done.stopped)?,
            ..Told::default()
        })
    }

    fn changed(&mut self, done: Changed<'_, F, Heap, NoMirror>, cells: [u64; 3]) -> Answer {
        done.flush.complete(|_| Self::pause(&mut self.random, 2));
        Ok(Told {
            came: done.replacing.pages(),
            gave_way: done.replaced.pages(),
            changed: done.leaves.pages(),
            cells: whole(cells).expect("the rest is alike under the lock"),
            stopped: stop(done.stopped)?,
            ..Told::default()
        })
    }

    fn run(&mut self, op: &Op) -> Answer {
        let table = self.table;
        match *op {
            Op::PlaceLarge(new) => {
                let attributes = Attributes::new(new.permissions);
                let valid = || {
                    Self::pause(&mut self.random, 4);
                    true
                };
                let done = table.place(address(0), PageSize::Size2M, new.run, attributes, new.present, valid);
                self.mapped(done)
            }
            Op::Map(part, new) => {
                let (attributes, pfn) =
                    (Attributes::new(new.permissions), frame(new.run, range(part).start()));
                let done = table.map(range(part), pfn, attributes, PageSize::Size4K, new.present);
                self.mapped(done)
            }
            Op::Fill(part, new) => {
                let attributes = Attributes::new(new.permissions);
                let random = &mut self.random;
                let done = if part.pages() == 1 {
                    let valid = || {
                        Self::pause(random, 4);
                        true
                    };
                    let (gpa, pfn) = (range(part).start(), frame(new.run, range(part).start()));
                    table.place(gpa, PageSize::Size4K, pfn, attributes, new.present, valid)
                } else {
                    let leaf = |gpa| {
                        Self::pause(random, 200);
                        Some((frame(new.run, gpa), attributes))
                    };
                    table.fill(range(part), new.present, || true, leaf)
                };
                self.mapped(done)
            }
            Op::Cursor(new) => {
                let mut cursor = table.cursor(new.present);
                let map = |cell: usize| {
                    let gpa = address(cell);
                    Self::pause(&mut self.random, 4);
                    let done = cursor.map(gpa, frame(new.run, gpa), Attributes::new(new.permissions));
                    done.map_err(|obstacle| Stopped { gpa, obstacle })
                };
                let stopped = (0..2).try_for_each(map).err();
                let mut done = cursor.finish();
                done.stopped = stopped;
                self.mapped(done)
            }
            Op::Unmap(part, edges) => {
                let done = table.unmap(range(part), edges);
                self.changed(done, [0; 3])
            }
            Op::Change(part, change, edges) => {
                let mut cells = [0; 3];
                let random = &mut self.random;
                let tell = |found: Mapping<F>| {
                    Self::pause(random, 8);
                    count(&mut cells, &found);
                };
                let done = match change {
                    Change::Protect(permissions) => table.protect(range(part), permissions, edges),
                    Change::WriteProtect => table.write_protect(range(part), edges),
                    Change::ClearDirty => table.test_and_clear_dirty(range(part), tell),
                    Change::ClearAccessed => table.test_and_clear_accessed(range(part), tell),
                };
                self.changed(done, cells)
            }
            Op::Split => {
                let done = table.split(range(Part::Whole), PageSize::Size4K);
                self.changed(done, [0; 3])
            }
            Op::Collapse => {
                let done = table.collapse(range(Part::Whole), PageSize::Size2M);
                self.changed(done, [0; 3])
            }
            Op::Query(part) => {
                let mut cells = [0; 3];
                table.for_each(range(part), |found| {
                    Self::pause(&mut self.random, 200);
                    count(&mut cells, &found);
                });
                // A large leaf is told whatever of it was asked for.
                (0..3).filter(|cell| !part.cells().contains(cell)).for_each(|cell| cells[cell] = 0);
                Ok(Told { cells: whole(cells)?, ..Told::default() })
            }
            Op::Walk(part) => {
                let gpa = range(part).start();
                Ok(Told { leaf: table.walk(gpa).map(|found| leaf(found, gpa)), ..Told::default() })
            }
            Op::Touch(part, access) => {
                let gpa = range(part).start();
                let (leaf, stopped) = match table.view().access(gpa, access) {
                    Ok(found) => (Some(leaf(found, gpa)), None),
                    Err(AccessFault::NotMapped) => (None, None),
                    Err(AccessFault::NotPermitted(found)) => {
                        (Some(leaf(found, gpa)), Some((part.cells().start, Stop::NotPermitted)))
                    }
                };
                Ok(Told { leaf, stopped, ..Told::default() })
            }
        }
    }
}

/// Counts the pages of a leaf in the cells that it maps.
fn count<F: TracksUse>(cells: &mut [u64; 3], found: &Mapping<F>) {
    match found.page_size {
        PageSize::Size4K => {
            cells[usize::from(found.gpa > address(0)) + usize::from(found.gpa > address(1))] += 1
        }
        _ => *cells = PAGES,
    }
}

/// Which cells were told, if each was as a whole.
fn whole(cells: [u64; 3]) -> Result<[bool; 3], HalfWay> {
    let all = cells.iter().zip(PAGES).all(|(told, pages)| *told == 0 || *told == pages);
    if all { Ok(cells.map(|told| told != 0)) } else { Err(HalfWay) }
}

fn choose(random: &mut Random) -> Op {
    fn one_of<T: Copy, const N: usize>(random: &mut Random, of: [T; N]) -> T {
        of[usize::try_from(random.below(N as u64)).expect("small")]
    }
    let page = one_of(random, [Part::First, Part::Second]);
    let part = one_of(random, [Part::First, Part::Second, Part::Rest, Part::Whole, Part::Whole]);
    let edges = one_of(random, [Edges::Split, Edges::Whole]);
    let permissions = one_of(random, [Permissions::READ, Permissions::READ_WRITE, Permissions::READ_WRITE]);
    let new = New {
        run: one_of(random, [RUNS[0], RUNS[0], RUNS[0], RUNS[1]]),
        permissions,
        present: one_of(random, [Present::Keep, Present::Collapse, Present::Rebuild]),
    };
    match random.below(23) {
        0..=2 => Op::PlaceLarge(new),
        3 => Op::Map(one_of(random, [Part::Whole, Part::Rest]), new),
        4 => Op::Map(page, new),
        5 => Op::Fill(one_of(random, [Part::Whole, Part::Rest]), new),
        6 | 7 => Op::Fill(page, new),
        8 => Op::Cursor(new),
        9..=11 => Op::Unmap(part, edges),
        12 => Op::Change(part, Change::Protect(permissions), edges),
        13 => Op::Change(part, Change::WriteProtect, edges),
        14 => Op::Change(part, Change::ClearDirty, Edges::Whole),
        15 => Op::Change(part, Change::ClearAccessed, Edges::Whole),
        16 => Op::Split,
        17 | 18 => Op::Collapse,
        19 => Op::Query(part),
        20 => Op::Walk(page),
        _ => Op::Touch(page, one_of(random, [Access::Read, Access::Write, Access::Write])),
    }
}

fn check<F: TracksUse>() {
    let (mut met, mut half_way, mut rounds) = (0, 0, 0);
    for round in 0..ROUNDS {
        let table = PageTable::<F, _>::new(Heap, Levels::Four).expect("a frame");
        let clock = Clock::default();
        let threads = at_once(round, STEPS, |_, random: &mut Random| {
            let op = choose(random);
            let mut world = World { table: &table, random: Random(random.next()) };
            clock.time(op, |op| world.run(op))
        });
        assert_eq!(table.leaves(), table.query(range(Part::Whole)));
        let Some(history) = told::<F>(threads, &mut half_way) else { continue };
        met += meetings(&history) as u64;
        rounds += 1;
        assert!(
            explains::<OneBlock<F>>(&history, State::EMPTY),
            "no order explains round {round} of {}:\n{}",
            F::NAME,
            show(&history)
        );
    }
    println!("{}: {rounds} rounds, {met} operations met another, {half_way} came half way", F::NAME);
    assert!(met > ROUNDS, "the threads hardly met: {met} of {} operations", rounds * 4 * STEPS as u64);
    assert!(rounds * 50 >= ROUNDS * 49, "{rounds} rounds of {ROUNDS} left");
}

/// The history without queries that came half way, which change nothing; none if another operation did.
fn told<F: TracksUse>(
    threads: Vec<Vec<Event<Op, Answer>>>,
    half_way: &mut u64,
) -> Option<History<OneBlock<F>>> {
    let event = |Event { op, told, began, ended }| match (told, op) {
        (Ok(told), _) => Some(Some(Event { op, told, began, ended })),
        (Err(HalfWay), Op::Query(_)) => Some(None),
        (Err(HalfWay), _) => None,
    };
    let told = threads.into_iter().map(|steps| {
        let events: Option<Vec<_>> = steps.into_iter().map(event).collect();
        Some(events?.into_iter().flatten().collect())
    });
    let history: Option<History<OneBlock<F>>> = told.collect();
    *half_way += u64::from(history.is_none());
    history
}

#[test]
fn what_no_order_explains_about_a_block_is_refused() {
    type Model = OneBlock<Ept>;
    let event = |op, told, began, ended| Event { op, told, began, ended };
    let check = |history: [Vec<Event<Op, Told>>; 2]| explains::<Model>(&history.into(), State::EMPTY);
    let new = New { run: RUNS[0], permissions: Permissions::READ_WRITE, present: Present::Keep };
    let used = |used| Attributes::new(Permissions::READ_WRITE).with_use(used);
    let found =
        |using| Told { leaf: Some(Ept::leaf(RUNS[0], PageSize::Size4K, used(using))), ..Told::default() };
    let pages = |pages| Told { changed: pages, ..Told::default() };
    let large = event(Op::PlaceLarge(new), Told { came: BLOCK, ..Told::default() }, 0, 1);
    let write = |part, began| event(Op::Touch(part, Access::Write), found(Use::ALL), began, began + 1);
    let walk = |part, using, began, ended| event(Op::Walk(part), found(using), began, ended);
    let absent = |part, began, ended| event(Op::Walk(part), Told::default(), began, ended);
    let first = event(Op::Unmap(Part::First, Edges::Split), pages(1), 4, 9);
    let first = Event { told: Told { came: BLOCK, gave_way: BLOCK, ..first.told }, ..first };

    // A write to a large leaf marks all of it, and to a page of a table that page.
    assert!(check([vec![large, write(Part::First, 2)], vec![walk(Part::Second, Use::ALL, 4, 5)]]));
    assert!(!check([vec![large, write(Part::First, 2)], vec![walk(Part::Second, Use::NONE, 4, 5)]]));
    // An unmapped page is gone at one moment, after a split that a write can come behind.
    let others = vec![absent(Part::First, 5, 6), walk(Part::Second, Use::NONE, 7, 8)];
    assert!(check([vec![large, first], others]));
    let back = vec![absent(Part::First, 5, 6), walk(Part::First, Use::NONE, 7, 8)];
    assert!(!check([vec![large, first], back]), "nobody mapped it again");
    assert!(!check([vec![large, first], vec![absent(Part::Second, 10, 11)]]), "the other pages stay");
    let write_after_split = vec![write(Part::First, 5), walk(Part::Second, Use::NONE, 7, 8)];
    assert!(check([vec![large, first], write_after_split]));
    // Walkers see the pages of a table change in ascending order, and one by one.
    let small = event(Op::Map(Part::Whole, new), Told { came: BLOCK, ..Told::default() }, 0, 3);
    assert!(check([vec![small], vec![walk(Part::First, Use::NONE, 1, 1), absent(Part::Second, 2, 2)]]));
    assert!(!check([vec![small], vec![walk(Part::Second, Use::NONE, 1, 1), absent(Part::First, 2, 2)]]));
    // Who takes the lock sees all of another's change or nothing of it.
    let half = event(Op::Unmap(Part::Whole, Edges::Whole), pages(1), 1, 2);
    assert!(!check([vec![small], vec![half]]));
    // Nothing is frozen where nothing was taken away.
    let frozen = Told { stopped: Some((0, Stop::Frozen)), ..Told::default() };
    assert!(!check([vec![large], vec![event(Op::Fill(Part::First, new), frozen, 0, 9)]]));
}

#[test]
fn answers_about_a_block_can_be_put_in_order() {
    check::<Ept>();
}

#[test]
fn answers_about_a_block_that_breaks_before_it_makes_can_be_put_in_order() {
    check::<Arm64Stage2>();
}
