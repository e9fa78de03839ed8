//! How the machine maps.

use premap_mmu::{Present, TracksUse};

use super::machine::{At, Block, Cell, Moment, Turn, frame};
use super::op::{BLOCK, New, Op, PAGES, Part, Stop};

impl<F: TracksUse> Turn<'_, F> {
    pub(super) fn place_large(&mut self, new: New) -> Moment {
        if self.state.block == Block::Frozen {
            return self.stops(0, Stop::Frozen);
        }
        self.unlocked()?;
        let leaf = new.leaf::<F>();
        match self.state.block {
            Block::Absent => {
                self.progress.told.came = BLOCK;
                self.state.block = Block::Large(leaf);
                self.ends()
            }
            Block::Large(old) if new.present != Present::Rebuild || old == leaf => {
                self.progress.told.spurious = BLOCK;
                self.ends()
            }
            Block::Large(old) if frame::<F>(old) != new.run => self.stops(0, Stop::Conflict),
            Block::Large(_) => {
                self.progress.told.changed = BLOCK;
                self.state.block = Block::Large(leaf);
                self.ends()
            }
            Block::Table(_) if new.present == Present::Keep => self.goes(At::Around),
            Block::Table(cells) => {
                let mut gave_way = 0;
                for (cell, pages) in cells.into_iter().zip(PAGES) {
                    match cell {
                        Cell::Leaf(old) if frame::<F>(old) != new.run => {
                            return self.stops(0, Stop::Conflict);
                        }
                        Cell::Leaf(_) => gave_way += pages,
                        Cell::Frozen => return self.stops(0, Stop::Frozen),
                        Cell::Absent => {}
                    }
                }
                self.progress.told.came = BLOCK;
                self.progress.told.gave_way = gave_way;
                self.replace(Block::Large(leaf), At::Thaw(None, [false; 3]))
            }
            Block::Frozen => None,
        }
    }

    pub(super) fn map(&mut self, part: Part, new: New) -> Moment {
        let first = part.cells().start;
        match self.state.block {
            Block::Frozen => self.stops(first, Stop::Frozen),
            Block::Large(leaf) => self.meet_large(leaf, part, new),
            Block::Absent => {
                self.unlocked()?;
                self.state.block = Block::Table([Cell::Absent; 3]);
                self.lock(first)
            }
            Block::Table(_) => self.lock(first),
        }
    }

    /// Comes to a large leaf with smaller ones.
    fn meet_large(&mut self, leaf: u64, part: Part, new: New) -> Moment {
        if let (Op::Map(..), Present::Rebuild) = (self.op, new.present) {
            if frame::<F>(leaf) != new.run {
                return self.stops(part.cells().start, Stop::Conflict);
            }
            if (leaf ^ new.leaf::<F>()) & !F::USE_BITS != 0 {
                return self.goes(At::Split);
            }
        } else if let (Op::Fill(..), Present::Rebuild) = (self.op, new.present) {
            return self.goes(At::Split);
        }
        self.progress.told.spurious += part.pages();
        self.ends()
    }

    /// Maps one page as a fault does, or as one of a cursor's.
    pub(super) fn map_page(&mut self, cell: usize, new: New) -> Moment {
        match (self.state.block, self.state.block.cell(cell)) {
            (Block::Large(leaf), _) => match self.op {
                Op::Fill(part, _) => self.meet_large(leaf, part, new),
                _ => {
                    self.progress.told.spurious += 1;
                    self.after_page(cell)
                }
            },
            (Block::Frozen, _) => self.stops(cell, Stop::Frozen),
            (_, Cell::Leaf(_)) if new.present != Present::Rebuild => {
                self.progress.told.spurious += 1;
                self.after_page(cell)
            }
            (block, _) => {
                self.unlocked()?;
                if block == Block::Absent {
                    self.state.block = Block::Table([Cell::Absent; 3]);
                }
                match self.install(cell, new) {
                    Ok(()) => self.after_page(cell),
                    Err(why) => self.stops(cell, why),
                }
            }
        }
    }

    fn after_page(&mut self, cell: usize) -> Moment {
        match self.op {
            Op::Cursor(_) if cell == 0 => self.goes(At::Free(1)),
            _ => self.ends(),
        }
    }

    /// Maps a cell of a table, with its lock held.
    pub(super) fn install(&mut self, cell: usize, new: New) -> Result<(), Stop> {
        let told = &mut self.progress.told;
        let Block::Table(cells) = &mut self.state.block else { return Ok(()) };
        match cells[cell] {
            Cell::Frozen => return Err(Stop::Frozen),
            Cell::Absent => told.came += PAGES[cell],
            Cell::Leaf(_) if new.present != Present::Rebuild => {
                told.spurious += PAGES[cell];
                return Ok(());
            }
            Cell::Leaf(old) if frame::<F>(old) != new.run => return Err(Stop::Conflict),
            Cell::Leaf(old) if old == new.leaf::<F>() => told.spurious += PAGES[cell],
            Cell::Leaf(_) => told.changed += PAGES[cell],
        }
        cells[cell] = Cell::Leaf(new.leaf::<F>());
        Ok(())
    }
}
