//! The walk.

use premap_address::{Gpa, Pfn};

use super::entry::Value;
use crate::operand::Level;
use crate::phymem::Page;
use crate::sparse::Sparse;
use crate::sync::{AtomicU64, Ordering};

/// Where a walk ended.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    pub(crate) word: &'a AtomicU64,
    /// What the word was.
    pub(crate) value: Value,
    /// The entry's level: the one asked for, or one above where the Secure-EPT leads no further.
    pub(crate) level: Level,
}

/// Walks from the root, whose entries are of level `top`, to the entry of `level`, or as far as tables lead.
#[inline]
pub(crate) fn walk(memory: &Sparse<Page>, root: Pfn, top: Level, gpa: Gpa, level: Level) -> Option<Walk<'_>> {
    let (mut table, mut at) = (root, top);
    loop {
        let word = memory.get(table)?.entries().get(at.index(gpa))?;
        // Acquire: what the entry points to is seen as its maker wrote it. Sequentially consistent for PROMOTE's sake.
        let value = Value::from_word(word.load(Ordering::SeqCst));
        let further =
            at.below().filter(|_| at > level && value.state().is_present() && !value.state().is_leaf());
        match further {
            Some(below) => (table, at) = (value.frame(), below),
            None => return Some(Walk { word, value, level: at }),
        }
    }
}

/// Makes a page a table without entries. Nobody walks it yet.
pub(crate) fn clear_table(page: &Page) {
    page.entries().iter().for_each(|word| word.store(Value::FREE.raw(), Ordering::Relaxed));
}
