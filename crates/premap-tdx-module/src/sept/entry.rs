//! An entry's value.

use premap_address::{PAGE_SIZE, PageSize, Pfn};
use premap_mmu::{Attributes, Format, Permissions, SecureEpt};

use super::state::EntryState;
use crate::operand::Level;

/// Bits 2:0.
const RWX: u64 = 0b111;
const PAGE: u64 = 0x000f_ffff_ffff_f000;
const STATE_SHIFT: u32 = 52;
const STATE: u64 = 0x7f << STATE_SHIFT;
/// Someone changes the entry.
pub(super) const LOCK: u64 = 1 << 60;
/// A host wants the lock.
pub(super) const HOST_PRIORITY: u64 = 1 << 61;

/// An entry as it is but for its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Value(u64);

impl Value {
    /// Maps nothing.
    pub(crate) const FREE: Self = Self(SecureEpt::ABSENT | (EntryState::Free as u64) << STATE_SHIFT);

    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word & !(LOCK | HOST_PRIORITY))
    }

    pub(crate) const fn raw(self) -> u64 {
        self.0
    }

    /// Points to a table.
    pub(crate) fn table(frame: Pfn) -> Self {
        Self(SecureEpt::table(frame)).in_state(EntryState::NonLeafMapped)
    }

    /// Has a page of this level.
    pub(crate) fn leaf(frame: Pfn, level: Level, state: EntryState) -> Self {
        let size = match level {
            Level::PT => PageSize::Size4K,
            Level::PD => PageSize::Size2M,
            _ => PageSize::Size1G,
        };
        let attributes =
            Attributes { permissions: Permissions::ALL, memory: (), used: premap_mmu::Use::NONE };
        Self(SecureEpt::leaf(frame, size, attributes)).in_state(state)
    }

    pub(crate) const fn state(self) -> EntryState {
        EntryState::from_encoding((self.0 & STATE) >> STATE_SHIFT)
    }

    /// The same page or table in another state, and as accessible as that makes it.
    pub(crate) const fn in_state(self, state: EntryState) -> Self {
        let access = if state.is_present() { RWX } else { 0 };
        Self(self.0 & !(STATE | RWX) | (state as u64) << STATE_SHIFT | access)
    }

    /// The page, or the table.
    pub(crate) const fn frame(self) -> Pfn {
        Pfn::new((self.0 & PAGE) / PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_page_through_every_state() {
        let leaf = Value::leaf(Pfn::new(0x1234), Level::PT, EntryState::Pending);
        assert_eq!((leaf.state(), leaf.frame()), (EntryState::Pending, Pfn::new(0x1234)));
        assert!(!SecureEpt::is_present(leaf.raw()));
        let mapped = leaf.in_state(EntryState::Mapped);
        assert!(SecureEpt::is_present(mapped.raw()) && mapped.frame() == leaf.frame());
        assert!(SecureEpt::is_leaf(Value::leaf(Pfn::new(0x200), Level::PD, EntryState::Mapped).raw(), 2));
        let table = Value::table(Pfn::new(9));
        assert!(SecureEpt::is_table(table.raw()) && table.state() == EntryState::NonLeafMapped);
        assert_eq!(Value::FREE.state(), EntryState::Free);
        assert_eq!(Value::from_word(table.raw() | LOCK | HOST_PRIORITY), table);
    }
}
