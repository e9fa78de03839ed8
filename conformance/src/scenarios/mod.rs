//! The scenarios. Each is a function generic over the kernel; its name says what must hold.

pub mod background;
pub mod backings;
pub mod dirty_log;
pub mod errnos;
pub mod gaps;
pub mod limits;
pub mod private;
pub mod roles;
pub mod shadow;
pub mod slots;
pub mod stress;

/// Faults that a guest may take on memory mapped ahead: its own code and page tables.
const FEW: u64 = 16;
