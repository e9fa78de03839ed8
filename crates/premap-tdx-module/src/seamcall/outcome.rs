//! What comes of a call.

use std::fmt;

use crate::operand::Level;
use crate::sept::{EntryState, Value};
use crate::status::{Class, Status};

/// A Secure-EPT entry as a call tells it: RCX and RDX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryInfo {
    /// The entry: RCX. Its page is there, and its accessibility; not its lock.
    pub entry: u64,
    /// Its level: RDX bits 2:0.
    pub level: Level,
    /// Its state: RDX bits 15:8.
    pub state: EntryState,
}

impl EntryInfo {
    pub(crate) fn new(value: Value, level: Level) -> Self {
        Self { entry: value.raw(), level, state: value.state() }
    }

    /// RDX: level and state.
    #[must_use]
    pub fn rdx(self) -> u64 {
        u64::from(self.level.raw()) | u64::from(self.state.public()) << 8
    }
}

/// A call's status other than success, and the Secure-EPT entry that it is about where the call tells one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Failure {
    /// RAX.
    pub status: Status,
    /// RCX and RDX.
    pub entry: Option<EntryInfo>,
}

impl Failure {
    pub(crate) const fn about(status: Status, entry: EntryInfo) -> Self {
        Self { status, entry: Some(entry) }
    }

    /// What happened, without the operand.
    #[must_use]
    pub const fn class(&self) -> Class {
        self.status.class()
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self { status, entry: None }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        match self.entry {
            Some(entry) => write!(f, " at an entry of {:?} that is {:?}", entry.level, entry.state),
            None => Ok(()),
        }
    }
}

/// What a call gives, or its status.
pub type Outcome<T = ()> = Result<T, Failure>;
