#![doc = include_str!("../README.md")]
//!
//! # Rooms
//!
//! | module | what happens in it |
//! |---|---|
//! | [`seamcall`] | the calls, one file a kind of work; counting and failing them |
//! | `legal` | in which OP_STATE, on which level and entry state each call works: one table |
//! | [`td`] | life cycle, parameters, vCPUs; the checks at the beginning of every call |
//! | `sept` | the Secure-EPT: entries, their lock, the walk |
//! | `pamt` | what each page is, and whose |
//! | [`phymem`] | the bytes, and who may see them; HKIDs |
//! | `locks` | locks that are tried and never waited for |
//! | `tlb` | epochs |
//! | [`guest`] | what a vCPU does: accept, read, write |
//! | `inject` | faults, for tests (feature `inject`) |
//!
//! Start reading at [`Module`], then `seamcall/mem_add.rs`, then the protocol in `sept`.
#![forbid(unsafe_code)]

mod config;
pub mod guest;
#[cfg(feature = "inject")]
pub mod inject;
mod kot;
mod legal;
mod locks;
mod module;
mod operand;
mod pamt;
pub mod phymem;
pub mod seamcall;
mod sept;
mod sparse;
pub mod status;
mod stripes;
mod sync;
pub mod td;
mod tlb;

pub use config::{Config, ConfigError};
pub use guest::{Cause, EptViolation, Guest, Stop};
pub use module::Module;
pub use operand::{Level, PageInfo};
pub use pamt::{PageRecord, PageType};
pub use phymem::{Hkid, HostAccessError, HpaRange, KeyIds};
pub use premap_address::{Gpa, Hpa, Pfn};
pub use seamcall::{
    EntryInfo, Failure, LogicalProcessor, Outcome, Package, Seamcall, Source, Table, TdField,
};
pub use sept::EntryState;
pub use status::{Class, Operand, Status};
pub use td::{Lifecycle, OpState, TDCS_PAGES, TDVPS_PAGES, TdParams};
