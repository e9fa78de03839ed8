//! Host-physical memory: bytes that are there, and who may see them.
//!
//! Pages are ordinary memory, made when first touched. A page that belongs to a TD is under the TD's key: no public call
//! gives the host its content, neither while it is the TD's nor after, until the host has written it itself. Hardware
//! has ciphertext there; here the host is refused ([`HostAccessError::Private`]), and a TD page given as PAGE.ADD's source
//! reads as zeros. Source: Intel TDX Module 1.5 base specification, memory integrity protection and TD memory access.

mod host;
mod key;
mod page;
mod range;

pub use host::HostAccessError;
pub use key::{Hkid, KeyIds};
pub use range::HpaRange;

pub(crate) use page::{BYTES, Page};
