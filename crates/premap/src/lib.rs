//! premap maps a virtual machine's memory before the guest touches it.
//!
//! KVM's pre-fault ioctl is a *read* fault. Alone, on fresh memory, it maps the shared zero page, and the guest's first
//! write then faults twice. After the host's side was populated by writing, it works: the guest takes no fault at all.
//! premap does both stages in that order, in parallel on lent vCPUs, within a budget, and reports every byte.
//!
//! ```text
//!   Plan --> engine --> host stage --> second stage --> Report
//! ```
//!
//! # Use from a VMM
//!
//! After the memslots are set and the vCPUs made, before the first `KVM_RUN`:
//!
//! ```no_run
//! use std::os::fd::BorrowedFd;
//!
//! use premap::{Backing, Engine, Gpa, GpaRange, Hva, Plan, Region, Touch};
//! use premap_kvm::linux::{Vcpu, Vm};
//!
//! fn premap(vm: BorrowedFd<'_>, vcpus: &[BorrowedFd<'_>], ram: *mut u8) -> Result<(), Box<dyn std::error::Error>> {
//!     let region = Region {
//!         range: GpaRange::try_new(Gpa::new(0), 512 << 20)?,
//!         host: Hva::new(ram.expose_provenance() as u64),
//!         backing: Backing::Anonymous,
//!         touch: Touch::Write,
//!     };
//!     let (vm, mut vcpus) = (Vm::new(vm), vcpus.iter().map(|fd| Vcpu::new(*fd)).collect::<Vec<_>>());
//!     let report = Engine::new().vm(&vm).run(&Plan::new([region])?, &mut vcpus)?;
//!     println!("{} of {} bytes are mapped", report.second.mapped, report.asked);
//!     Ok(())
//! }
//! ```
//!
//! The VMM's seccomp filter must allow `ioctl` with request 0xc040aed5, and `madvise` with advice 22 and 23, on the
//! threads that the engine starts.

// The README's example must compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

mod budget;
mod clock;
mod control;
mod engine;
mod host_stage;
mod interrupt;
mod memory;
mod patience;
mod pipeline;
mod plan;
mod report;
mod run;
mod second_stage;
mod tally;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
mod watchdog;
pub mod working_set;

pub use budget::{Budget, Stop};
pub use engine::{DEFAULT_PATIENCE, Engine, Error, Progress, Stages};
pub use memory::{Backing, Region, Touch};
pub use plan::{DEFAULT_CHUNK, Plan, PlanError};
pub use premap_address::{Gpa, GpaRange, Hva, PageSize, RangeError};
pub use report::{Fate, PageCounts, Reason, Report, Stage, StageReport, Unmapped, Unsupported};
