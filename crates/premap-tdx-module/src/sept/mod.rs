//! The Secure-EPT: a TD's second-stage table, in pages that the host gave and can't read.
//!
//! # Entries
//!
//! An entry is spelled as [`premap_mmu::SecureEpt`] spells tables and leaves, and has the module's state in bits that
//! hardware ignores:
//!
//! ```text
//!  63   62  61   60    58          52 51            12 11   8 7    6  3 2   0
//! +---+---+----+------+--------------+----------------+------+----+-----+-----+
//! |sve| 0 | HP | lock |    state     |      page      |  0   |leaf| mem | rwx |
//! +---+---+----+------+--------------+----------------+------+----+-----+-----+
//! ```
//!
//! What is not mapped (free, removed, blocked, pending) has no rwx, so a walk ends there. The root is the fourth TDCX page.
//!
//! # Protocol
//!
//! 1. Who changes an entry holds its lock, a bit of the entry. It is tried once. A host that misses sets HP; a guest that
//!    then finds the lock free leaves it to the host and is told OPERAND_BUSY_HOST_PRIORITY. The next host clears HP; so
//!    does a host that publishes a new entry.
//! 2. Walks take no lock. A table goes away in two ways: SEPT.REMOVE, which holds the whole tree alone; and PROMOTE, which
//!    holds all of the table's entries, so that nobody can lock one any more, links the large leaf in the table's place,
//!    and waits for the walks of that moment to end before it gives the page back.
//! 3. A guest's walk is safe by [TLB tracking](crate::tlb): a table or a page goes away when no vCPU is inside that entered
//!    before it was blocked.
//!
//! Source: Intel TDX Module 1.5 base specification, Secure-EPT; states and their encodings from its ABI specification.

mod entry;
mod lock;
mod state;
mod walk;

pub(crate) use entry::Value;
pub(crate) use lock::{Locked, lock_by_guest, lock_by_host};
pub use state::EntryState;
pub(crate) use state::States;
pub(crate) use walk::{Walk, clear_table, walk};
