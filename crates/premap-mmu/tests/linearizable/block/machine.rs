//! A block of 2 MiB as a sequential machine.
//!
//! Pages 0 and 1 stand for themselves, and the other 510 are always alike: three *cells*. An operation that holds the
//! leaf table's lock does the cells in ascending order, and between two of them only walkers come in; a large leaf, and a
//! table as a whole, change in one moment. What was frozen thaws in moments of its own, for which no lock is needed.

use std::marker::PhantomData;

use premap_mmu::{Access, Edges, PageSize, Pfn, TracksUse};

use super::op::{BLOCK, Change, Op, PAGES, Part, Stop, Told};
use crate::order::{Machine, Next};

/// What a cell holds. A leaf is spelled as one of 4 KiB on the run's first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cell {
    Absent,
    Frozen,
    Leaf(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Block {
    Absent,
    Frozen,
    Large(u64),
    Table([Cell; 3]),
}

impl Block {
    pub(super) fn cell(self, cell: usize) -> Cell {
        match self {
            Self::Absent => Cell::Absent,
            Self::Frozen => Cell::Frozen,
            Self::Large(leaf) => Cell::Leaf(leaf),
            Self::Table(cells) => cells[cell],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) block: Block,
    /// Who holds the leaf table's lock between two moments.
    pub(crate) holder: Option<usize>,
}

impl State {
    pub(crate) const EMPTY: Self = Self { block: Block::Absent, holder: None };
}

/// Where an operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum At {
    /// Nothing is done, or the large leaf that was in the way is split.
    #[default]
    Start,
    /// A table was found where a large leaf was to be mapped: what is absent is mapped around it.
    Around,
    /// A large leaf was found in the way, and is to be split.
    Split,
    /// It holds the lock and comes to this cell.
    Holding(usize),
    /// It comes to this cell without a lock.
    Free(usize),
    /// The flush is done: what was frozen thaws, the block to become this, or the cells absent.
    Thaw(Option<Block>, [bool; 3]),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Progress {
    at: At,
    pub(super) told: Told,
    /// The cells frozen so far.
    frozen: [bool; 3],
}

pub(super) type Moment = Option<Next<Progress, Told>>;

/// One block of a format.
pub(crate) struct OneBlock<F>(PhantomData<F>);

impl<F: TracksUse> Machine for OneBlock<F> {
    type Op = Op;
    type Told = Told;
    type State = State;
    type Progress = Progress;

    fn moment(state: &mut State, thread: usize, op: &Op, progress: &Progress) -> Moment {
        let mut turn = Turn::<F> { state, thread, op: *op, progress: *progress, format: PhantomData };
        match (progress.at, *op) {
            (At::Thaw(block, cells), _) => turn.thaw(block, cells),
            (At::Split, _) => turn.split(),
            (At::Holding(cell), _) => turn.with_lock(cell),
            (At::Free(cell), Op::Cursor(new)) => turn.map_page(cell, new),
            (At::Free(cell), _) => turn.look(cell),
            (At::Around, Op::PlaceLarge(new)) => turn.map(Part::Whole, new),
            (_, Op::PlaceLarge(new)) => turn.place_large(new),
            (_, Op::Map(part, new)) => turn.map(part, new),
            (_, Op::Fill(part @ (Part::First | Part::Second), new)) => turn.map_page(part.cells().start, new),
            (_, Op::Fill(part, new)) => turn.map(part, new),
            (_, Op::Cursor(new)) => turn.map_page(0, new),
            (_, Op::Unmap(part, edges)) => turn.unmap(part, edges),
            (_, Op::Change(part, change, edges)) => turn.change(part, change, edges),
            (_, Op::Split) => turn.split_if_large(),
            (_, Op::Collapse) => turn.collapse(),
            (_, Op::Query(part)) => turn.look(part.cells().start),
            (_, Op::Walk(part)) => turn.walk(part.cells().start),
            (_, Op::Touch(part, access)) => turn.touch(part.cells().start, access),
        }
    }
}

/// One moment of one thread.
pub(super) struct Turn<'s, F> {
    pub(super) state: &'s mut State,
    thread: usize,
    pub(super) op: Op,
    pub(super) progress: Progress,
    format: PhantomData<F>,
}

impl<F: TracksUse> Turn<'_, F> {
    pub(super) fn goes(&self, at: At) -> Moment {
        Some(Next::Goes(Progress { at, ..self.progress }))
    }

    pub(super) fn ends(&self) -> Moment {
        Some(Next::Ends(self.progress.told))
    }

    pub(super) fn stops(&mut self, cell: usize, why: Stop) -> Moment {
        self.progress.told.stopped = Some((cell, why));
        self.ends()
    }

    /// Goes on if nobody holds the lock.
    pub(super) fn unlocked(&self) -> Option<()> {
        self.state.holder.is_none().then_some(())
    }

    pub(super) fn lock(&mut self, cell: usize) -> Moment {
        self.unlocked()?;
        self.state.holder = Some(self.thread);
        self.goes(At::Holding(cell))
    }

    /// The part that the operation is about.
    pub(super) fn part(&self) -> Part {
        match self.op {
            Op::Map(part, _) | Op::Fill(part, _) | Op::Unmap(part, _) => part,
            Op::Change(part, ..) | Op::Query(part) | Op::Walk(part) | Op::Touch(part, _) => part,
            Op::PlaceLarge(_) | Op::Cursor(_) | Op::Split | Op::Collapse => Part::Whole,
        }
    }

    fn thaw(&mut self, block: Option<Block>, mut cells: [bool; 3]) -> Moment {
        if let Some(block) = block {
            self.state.block = block;
            return self.ends();
        }
        let Some(cell) = cells.iter().position(|frozen| *frozen) else { return self.ends() };
        if let Block::Table(own) = &mut self.state.block {
            own[cell] = Cell::Absent;
        }
        cells[cell] = false;
        if cells == [false; 3] { self.ends() } else { self.goes(At::Thaw(None, cells)) }
    }

    /// Puts one block in the place of another: at once, or through a frozen entry where the format asks for it.
    pub(super) fn replace(&mut self, block: Block, then: At) -> Moment {
        if F::BREAK_BEFORE_MAKE {
            self.state.block = Block::Frozen;
            return self.goes(At::Thaw(Some(block), [false; 3]));
        }
        self.state.block = block;
        self.goes(then)
    }

    fn split(&mut self) -> Moment {
        self.unlocked()?;
        let first = self.part().cells().start;
        match self.state.block {
            Block::Large(leaf) => {
                self.progress.told.came += BLOCK;
                self.progress.told.gave_way += BLOCK;
                if F::BREAK_BEFORE_MAKE {
                    self.progress.told.stopped = Some((first, Stop::Frozen));
                }
                self.replace(Block::Table([Cell::Leaf(leaf); 3]), At::Start)
            }
            Block::Frozen => self.stops(first, Stop::Frozen),
            Block::Absent | Block::Table(_) => self.goes(At::Start),
        }
    }

    fn split_if_large(&mut self) -> Moment {
        if let Block::Large(_) = self.state.block { self.goes(At::Split) } else { self.ends() }
    }

    /// Does one cell of a table under its lock, and gives the lock back after the last.
    fn with_lock(&mut self, cell: usize) -> Moment {
        let mut stopped = None;
        match self.op {
            Op::Map(_, new) | Op::Fill(_, new) | Op::PlaceLarge(new) => {
                stopped = self.install(cell, new).err();
            }
            Op::Unmap(..) => {
                if let Block::Table(cells) = &mut self.state.block
                    && let Cell::Leaf(_) = cells[cell]
                {
                    cells[cell] = Cell::Frozen;
                    self.progress.frozen[cell] = true;
                    self.progress.told.changed += PAGES[cell];
                }
            }
            Op::Change(_, change, _) => {
                if let Block::Table(cells) = &mut self.state.block
                    && let Cell::Leaf(old) = cells[cell]
                    && change.apply::<F>(old) != old
                {
                    cells[cell] = Cell::Leaf(change.apply::<F>(old));
                    self.progress.told.changed += PAGES[cell];
                    self.progress.told.cells[cell] = change.tells();
                }
            }
            _ => return None,
        }
        if stopped.is_none() && cell + 1 < self.part().cells().end {
            return self.goes(At::Holding(cell + 1));
        }
        self.state.holder = None;
        match stopped {
            Some(why) => self.stops(cell, why),
            None => self.goes(At::Thaw(None, self.progress.frozen)),
        }
    }

    fn unmap(&mut self, part: Part, edges: Edges) -> Moment {
        match self.state.block {
            Block::Absent | Block::Frozen => self.ends(),
            Block::Large(_) if edges == Edges::Split && part != Part::Whole => self.goes(At::Split),
            Block::Large(_) => {
                self.unlocked()?;
                self.progress.told.changed += BLOCK;
                self.state.block = Block::Frozen;
                self.goes(At::Thaw(Some(Block::Absent), [false; 3]))
            }
            Block::Table(cells) if part == Part::Whole && !cells.contains(&Cell::Frozen) => {
                self.unlocked()?;
                let leaves = cells.iter().zip(PAGES).filter(|(cell, _)| **cell != Cell::Absent);
                self.progress.told.changed += leaves.map(|(_, pages)| pages).sum::<u64>();
                self.state.block = Block::Frozen;
                self.goes(At::Thaw(Some(Block::Absent), [false; 3]))
            }
            Block::Table(_) => self.lock(part.cells().start),
        }
    }

    fn change(&mut self, part: Part, change: Change, edges: Edges) -> Moment {
        match self.state.block {
            Block::Absent | Block::Frozen => self.ends(),
            Block::Table(_) => self.lock(part.cells().start),
            Block::Large(leaf) => {
                let new = change.apply::<F>(leaf);
                if new == leaf {
                    return self.ends();
                }
                if edges == Edges::Split && part != Part::Whole {
                    return self.goes(At::Split);
                }
                self.unlocked()?;
                self.state.block = Block::Large(new);
                self.progress.told.changed += BLOCK;
                self.progress.told.cells = [change.tells(); 3];
                self.ends()
            }
        }
    }

    fn collapse(&mut self) -> Moment {
        let Block::Table(cells) = self.state.block else { return self.ends() };
        self.unlocked()?;
        let Cell::Leaf(first) = cells[0] else { return self.ends() };
        for cell in cells {
            match cell {
                Cell::Leaf(leaf) if frame::<F>(leaf) != frame::<F>(first) => return self.ends(),
                Cell::Frozen => return self.stops(0, Stop::Frozen),
                Cell::Leaf(_) | Cell::Absent => {}
            }
        }
        let attributes = |leaf| F::attributes(leaf, PageSize::Size4K);
        let mut joined = attributes(first);
        for cell in cells {
            match cell {
                Cell::Leaf(leaf) if attributes(leaf).with_use(joined.used) == joined => {
                    joined.used.dirty |= attributes(leaf).used.dirty;
                }
                _ => return self.ends(),
            }
        }
        joined.used.accessed = true;
        joined.used.dirty |= joined.permissions.writable();
        self.progress.told.came = BLOCK;
        self.progress.told.gave_way = BLOCK;
        let leaf = F::leaf(frame::<F>(first), PageSize::Size4K, joined);
        self.replace(Block::Large(leaf), At::Thaw(None, [false; 3]))
    }

    fn look(&mut self, cell: usize) -> Moment {
        if let Cell::Leaf(_) = self.state.block.cell(cell) {
            self.progress.told.cells[cell] = true;
        }
        if cell + 1 < self.part().cells().end { self.goes(At::Free(cell + 1)) } else { self.ends() }
    }

    fn walk(&mut self, cell: usize) -> Moment {
        if let Cell::Leaf(leaf) = self.state.block.cell(cell) {
            self.progress.told.leaf = Some(leaf);
        }
        self.ends()
    }

    fn touch(&mut self, cell: usize, access: Access) -> Moment {
        let Cell::Leaf(leaf) = self.state.block.cell(cell) else { return self.ends() };
        let touched = F::touch(leaf, access);
        self.progress.told.leaf = Some(touched.unwrap_or(leaf));
        let Some(touched) = touched else { return self.stops(cell, Stop::NotPermitted) };
        match &mut self.state.block {
            Block::Large(leaf) => *leaf = touched,
            Block::Table(cells) => cells[cell] = Cell::Leaf(touched),
            Block::Absent | Block::Frozen => {}
        }
        self.ends()
    }
}

pub(super) fn frame<F: TracksUse>(leaf: u64) -> Pfn {
    F::frame(leaf, PageSize::Size4K)
}
