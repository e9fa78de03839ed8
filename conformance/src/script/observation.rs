//! What is seen after an operation.

use std::fmt;

use premap_guest::{GuestError, MachineError, MappedPages, MemoryFault};
use premap_kvm::Errno;

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was to do.
    Done,
    /// The kernel refused.
    Errno(Errno),
    /// The guest left for user space: an access that met no memory, or a write to read-only memory.
    Mmio,
    /// The guest left for user space: a page that could not be had. The observation's fault says which.
    MemoryFault,
    /// Anything else that the guest left for.
    Exit(String),
}

impl From<Result<(), Errno>> for Outcome {
    fn from(result: Result<(), Errno>) -> Self {
        result.map_or_else(Self::Errno, |()| Self::Done)
    }
}

impl From<GuestError> for Outcome {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Mmio { .. } => Self::Mmio,
            GuestError::MemoryFault { .. } => Self::MemoryFault,
            GuestError::Call { errno, .. } => Self::Errno(errno),
            other => Self::Exit(other.to_string()),
        }
    }
}

impl From<MachineError> for Outcome {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Guest { error, .. } => error.into(),
            MachineError::Call { errno, .. } => Self::Errno(errno),
            other => Self::Exit(other.to_string()),
        }
    }
}

/// What was observed after one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What it came to.
    pub outcome: Outcome,
    /// What a pre-fault left of its range: address in bytes from the base, and length.
    pub left: Option<(u64, u64)>,
    /// The word that was read.
    pub word: Option<u64>,
    /// What `kvm_run` said of a page that could not be had.
    pub fault: Option<MemoryFault>,
    /// Faults that the operation cost the guest.
    pub faults: u64,
    /// Pages mapped for the window after it.
    pub mapped: MappedPages,
    /// Pages that a dirty log gave.
    pub dirty: Vec<u64>,
}

impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Done => f.write_str("done")?,
            Outcome::Errno(errno) => write!(f, "{errno}")?,
            Outcome::Mmio => f.write_str("MMIO exit")?,
            Outcome::MemoryFault => f.write_str("memory fault")?,
            Outcome::Exit(why) => f.write_str(why)?,
        }
        if let Some((gpa, bytes)) = self.left {
            write!(f, ", left {bytes:#x} bytes at {gpa:#x}")?;
        }
        if let Some(word) = self.word {
            write!(f, ", read {word:#x}")?;
        }
        if let Some(MemoryFault { range, private }) = self.fault {
            let kind = if private { "private" } else { "shared" };
            write!(f, ", wanted {:#x} bytes {kind} at gpa {}", range.bytes(), range.start())?;
        }
        let MappedPages { pages_4k, pages_2m, pages_1g } = self.mapped;
        write!(f, ", {} faults, mapped {pages_4k} + {pages_2m} + {pages_1g}", self.faults)?;
        if !self.dirty.is_empty() {
            write!(f, ", dirty {:x?}", self.dirty)?;
        }
        Ok(())
    }
}
