//! When a call is legal: OP_STATE, level, and the state of the Secure-EPT entry.
//!
//! | SEAMCALL | OP_STATE | level | entry |
//! |---|---|---|---|
//! | MNG.ADDCX, MNG.INIT | 0 | | |
//! | VP.CREATE, VP.ADDCX | 1, 7 | | |
//! | VP.INIT, MR.FINALIZE | 1 | | |
//! | VP.ENTER | 2, 3, 9 | | |
//! | MNG.RD | 1 to 10 | | |
//! | SEPT.ADD | 1, 2, 3, 6 to 9 | 1 to top | FREE |
//! | SEPT.RD | 1 to 10 | 0 to top | any |
//! | SEPT.REMOVE | 1 to 10 | 1 to top | NL_MAPPED, NL_BLOCKED |
//! | PAGE.ADD | 1 | 0 | FREE |
//! | PAGE.AUG | 1, 2, 3, 9 | 0, 1 | FREE, REMOVED |
//! | PAGE.REMOVE | 1 to 5, 8 to 10 | 0 to 2 | leaves |
//! | PAGE.RELOCATE | 1 to 5, 8, 9 | 0 | leaves |
//! | PAGE.PROMOTE | 1 to 5, 8, 9 | 1, 2 | NL_MAPPED, NL_BLOCKED |
//! | PAGE.DEMOTE | 1 to 5, 8, 9 | 1, 2 | MAPPED, BLOCKED, PENDING, PENDING_BLOCKED |
//! | RANGE.BLOCK | 1 to 5, 8, 9 | 0 to top | NL_MAPPED, MAPPED, PENDING, BLOCKEDW, PENDING_BLOCKEDW |
//! | RANGE.UNBLOCK | 1 to 5, 8, 9 | 0 to top | NL_BLOCKED, BLOCKED, PENDING_BLOCKED |
//! | TRACK | 1 to 9 | | |
//! | MR.EXTEND | 1 | 0 | MAPPED |
//!
//! Source: Intel TDX Module 1.5 ABI specification, the operation state and Secure-EPT state tables.

use std::ops::RangeInclusive;

use crate::operand::Level;
use crate::seamcall::Seamcall;
use crate::sept::{EntryState, States};
use crate::td::OpStates;

use EntryState as E;
use Seamcall as C;

const BUILT: OpStates = OpStates::of(&[1, 2, 3, 4, 5, 8, 9]);
const EVERY: OpStates = OpStates::of(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
const LEAVES: States = States::of(&[
    E::Mapped,
    E::Blocked,
    E::BlockedForWriting,
    E::Pending,
    E::PendingBlocked,
    E::PendingBlockedForWriting,
]);

impl Seamcall {
    /// The OP_STATEs in which the call does its work. Calls that don't look at OP_STATE have every one.
    #[must_use]
    pub const fn op_states(self) -> OpStates {
        match self {
            C::MngAddcx | C::MngInit => OpStates::of(&[0]),
            C::VpCreate | C::VpAddcx => OpStates::of(&[1, 7]),
            C::VpInit | C::MrFinalize | C::MrExtend | C::MemPageAdd => OpStates::of(&[1]),
            C::VpEnter => OpStates::of(&[2, 3, 9]),
            C::MngRd | C::MemSeptRd | C::MemSeptRemove => OpStates::of(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
            C::MemSeptAdd => OpStates::of(&[1, 2, 3, 6, 7, 8, 9]),
            C::MemPageAug => OpStates::of(&[1, 2, 3, 9]),
            C::MemPageRemove => OpStates::of(&[1, 2, 3, 4, 5, 8, 9, 10]),
            C::MemPageRelocate
            | C::MemPagePromote
            | C::MemPageDemote
            | C::MemRangeBlock
            | C::MemRangeUnblock => BUILT,
            C::MemTrack => OpStates::of(&[1, 2, 3, 4, 5, 6, 7, 8, 9]),
            C::MngCreate
            | C::MngKeyConfig
            | C::MngVpflushdone
            | C::MngKeyFreeid
            | C::VpFlush
            | C::PhymemPageReclaim
            | C::PhymemPageWbinvd => EVERY,
        }
    }

    /// The states of the entry that the call works on.
    pub(crate) const fn entry_states(self) -> States {
        match self {
            C::MemSeptAdd | C::MemPageAdd => States::of(&[E::Free]),
            C::MemPageAug => States::of(&[E::Free, E::Removed]),
            C::MemPageRemove | C::MemPageRelocate => LEAVES,
            C::MemSeptRemove | C::MemPagePromote => States::of(&[E::NonLeafMapped, E::NonLeafBlocked]),
            C::MemPageDemote => States::of(&[E::Mapped, E::Blocked, E::Pending, E::PendingBlocked]),
            C::MemRangeBlock => States::of(&[
                E::NonLeafMapped,
                E::Mapped,
                E::Pending,
                E::BlockedForWriting,
                E::PendingBlockedForWriting,
            ]),
            C::MemRangeUnblock => States::of(&[E::NonLeafBlocked, E::Blocked, E::PendingBlocked]),
            C::MrExtend => States::of(&[E::Mapped]),
            C::MemSeptRd => States::of(&E::ALL),
            _ => States::of(&[]),
        }
    }

    /// The levels that the call takes, in a TD whose root has entries of level `top`.
    pub(crate) const fn levels(self, top: Level) -> RangeInclusive<Level> {
        match self {
            C::MemPageAug => Level::PT..=Level::PD,
            C::MemPageRemove => Level::PT..=Level::PDPT,
            C::MemPagePromote | C::MemPageDemote => Level::PD..=Level::PDPT,
            C::MemSeptAdd | C::MemSeptRemove => Level::PD..=top,
            C::MemRangeBlock | C::MemRangeUnblock | C::MemSeptRd => Level::PT..=top,
            _ => Level::PT..=Level::PT,
        }
    }
}
