//! The addresses of a virtual machine, each a type of its own.
//!
//! ```text
//!   guest-physical            host-virtual            host-physical
//!      Gpa  --(memslot)-->        Hva   --(host's page tables)-->   Hpa
//!      Gfn  --------------(second-stage tables)-------------------> Pfn
//! ```
//!
//! A [`Gpa`] is never a `u64` by accident: there is no `+` between addresses, no implicit conversion, and every
//! operation that can overflow says in its name what it does then. [`GpaRange`] is page-aligned and never empty by
//! construction, so that code which takes one has nothing left to check.
#![no_std]

mod address;
mod page;
mod range;

pub use address::{Gfn, Gpa, Hpa, Hva, Pfn};
pub use page::{PAGE_SHIFT, PAGE_SIZE, PageSize};
pub use range::{GpaRange, RangeError};
