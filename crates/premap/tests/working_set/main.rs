//! Working sets as files, and as the order of a VM's memory.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod file;
mod order;
