//! Private memory: what a VM of type software-protected has beside the memory that it shares with its VMM.
//!
//! A page of such a VM is shared or private, as its *attribute* says, which the VMM sets. A shared page lies at the slot's
//! address in the VMM, as in every VM. A private one lies in a *guest_memfd*: a file that the VMM can make, bind to a slot
//! and punch holes into, but neither read, write nor map. A guest's touch of a page that its slot has no such memory for
//! goes back to the VMM as a memory fault, which says what was missing.

mod attributes;
mod bindings;
mod fault;
mod guest_memfd;
mod memory;

pub(crate) use attributes::{Attributes, Kind};
pub(crate) use bindings::{Held, PrivateMemory};
pub use fault::MemoryFault;
pub use guest_memfd::GuestMemfd;
pub(crate) use guest_memfd::GuestMemfds;
