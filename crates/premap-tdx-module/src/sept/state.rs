//! The states of an entry, and sets of them.

/// The state of a Secure-EPT entry. Of those that only a migration makes, the ones are here that calls must tell apart; none
/// of the calls leads to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryState {
    /// Maps nothing.
    Free = 0x0e,
    /// Maps nothing any more, in a TD that is imported.
    Removed = 0x0c,
    /// Points to a table.
    NonLeafMapped = 0x00,
    /// Points to a table, blocked.
    NonLeafBlocked = 0x08,
    /// Maps a page.
    Mapped = 0x60,
    /// Has a page, blocked.
    Blocked = 0x68,
    /// Maps a page, blocked for writing (export).
    BlockedForWriting = 0x64,
    /// Has a page that the guest did not accept yet.
    Pending = 0x70,
    /// The same, blocked.
    PendingBlocked = 0x78,
    /// The same, blocked for writing (export).
    PendingBlockedForWriting = 0x74,
}

use EntryState as S;

impl EntryState {
    /// Every state.
    pub const ALL: [Self; 10] = [
        S::Free,
        S::Removed,
        S::NonLeafMapped,
        S::NonLeafBlocked,
        S::Mapped,
        S::Blocked,
        S::BlockedForWriting,
        S::Pending,
        S::PendingBlocked,
        S::PendingBlockedForWriting,
    ];

    /// The number that the host is told (RDX bits 15:8).
    #[must_use]
    pub const fn public(self) -> u8 {
        match self {
            S::Free => 0,
            S::Removed => 5,
            S::NonLeafMapped => 0x84,
            S::NonLeafBlocked => 0x81,
            S::Mapped => 4,
            S::Blocked => 1,
            S::BlockedForWriting => 8,
            S::Pending => 2,
            S::PendingBlocked => 3,
            S::PendingBlockedForWriting => 16,
        }
    }

    /// The state of this encoding in an entry.
    pub(crate) const fn from_encoding(encoding: u64) -> Self {
        match encoding {
            0x0c => S::Removed,
            0x00 => S::NonLeafMapped,
            0x08 => S::NonLeafBlocked,
            0x60 => S::Mapped,
            0x68 => S::Blocked,
            0x64 => S::BlockedForWriting,
            0x70 => S::Pending,
            0x78 => S::PendingBlocked,
            0x74 => S::PendingBlockedForWriting,
            _ => S::Free,
        }
    }

    /// Whether the entry has a page.
    #[must_use]
    pub const fn is_leaf(self) -> bool {
        !matches!(self, S::Free | S::Removed | S::NonLeafMapped | S::NonLeafBlocked)
    }

    /// Whether the entry is blocked, for more than writing.
    #[must_use]
    pub const fn is_blocked(self) -> bool {
        matches!(self, S::NonLeafBlocked | S::Blocked | S::PendingBlocked)
    }

    /// Whether the guest must accept the page first.
    #[must_use]
    pub const fn is_pending(self) -> bool {
        matches!(self, S::Pending | S::PendingBlocked | S::PendingBlockedForWriting)
    }

    /// Whether hardware walks through the entry, or maps by it.
    pub(crate) const fn is_present(self) -> bool {
        matches!(self, S::NonLeafMapped | S::Mapped | S::BlockedForWriting)
    }

    /// What BLOCK makes of it.
    pub(crate) const fn blocked(self) -> Self {
        match self {
            S::NonLeafMapped => S::NonLeafBlocked,
            S::Mapped | S::BlockedForWriting => S::Blocked,
            S::Pending | S::PendingBlockedForWriting => S::PendingBlocked,
            other => other,
        }
    }

    /// What it is without the block.
    pub(crate) const fn unblocked(self) -> Self {
        match self {
            S::NonLeafBlocked => S::NonLeafMapped,
            S::Blocked | S::BlockedForWriting => S::Mapped,
            S::PendingBlocked | S::PendingBlockedForWriting => S::Pending,
            other => other,
        }
    }

    const fn bit(self) -> u16 {
        1 << match self {
            S::Free => 0,
            S::Removed => 1,
            S::NonLeafMapped => 2,
            S::NonLeafBlocked => 3,
            S::Mapped => 4,
            S::Blocked => 5,
            S::BlockedForWriting => 6,
            S::Pending => 7,
            S::PendingBlocked => 8,
            S::PendingBlockedForWriting => 9,
        }
    }
}

/// A set of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct States(u16);

impl States {
    pub(crate) const fn of(states: &[EntryState]) -> Self {
        let (mut set, mut rest) = (0, states);
        while let [first, tail @ ..] = rest {
            set |= first.bit();
            rest = tail;
        }
        Self(set)
    }

    pub(crate) const fn contain(self, state: EntryState) -> bool {
        self.0 & state.bit() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_spelled_and_blocked_one_to_one() {
        for state in EntryState::ALL {
            assert_eq!(EntryState::from_encoding(state as u64), state);
            assert!(!state.unblocked().is_blocked());
            assert!(state.blocked() == state || state.blocked().is_blocked());
            assert!(States::of(&EntryState::ALL).contain(state));
            assert_eq!(States::of(&[EntryState::Pending]).contain(state), state == EntryState::Pending);
        }
    }
}
