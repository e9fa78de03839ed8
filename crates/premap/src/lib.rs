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
//! use premap::{Backing, Budget, Engine, Gpa, GpaRange, Hva, Plan, Region, Touch};
//! use premap::kvm::linux::{Vcpu, Vm};
//!
//! fn premap(vm: BorrowedFd<'_>, vcpus: &[BorrowedFd<'_>], ram: *mut u8) -> Result<(), Box<dyn std::error::Error>> {
//!     let region = Region {
//!         range: GpaRange::try_new(Gpa::new(0), 512 << 20)?,
//!         host: Hva::new(ram.expose_provenance() as u64),
//!         backing: Backing::Anonymous,
//!         touch: Touch::Write,
//!     };
//!     let (vm, mut vcpus) = (Vm::new(vm), vcpus.iter().map(|fd| Vcpu::new(*fd)).collect::<Vec<_>>());
//!     let budget = Budget::within_host_memory();
//!     let report = Engine::new().vm(&vm).budget(budget).run(&Plan::new([region])?, &mut vcpus)?;
//!     println!("{} of {} bytes are mapped", report.second.mapped, report.asked);
//!     Ok(())
//! }
//! ```
//!
//! # While the guest runs
//!
//! A VMM that will not wait makes a spare vCPU, which it never runs, and lends that. The gate is closed around each change of
//! a memslot:
//!
//! ```no_run
//! use std::os::fd::OwnedFd;
//!
//! use premap::{Engine, Gate, Pace, Plan};
//! use premap::kvm::linux::Vcpu;
//!
//! fn premap(plan: Plan, spare: OwnedFd, gate: &Gate) -> Result<(), Box<dyn std::error::Error>> {
//!     let half_a_core = Pace::PercentOfCore(50.try_into()?);
//!     let background = Engine::new().pace(half_a_core).gate(gate).background(plan, vec![Vcpu::new(spare)])?;
//!     // The guest runs. On another thread, a device is plugged in:
//!     let guard = gate.close();
//!     // KVM_SET_USER_MEMORY_REGION
//!     drop(guard);
//!     println!("{:?}", background.join()?);
//!     Ok(())
//! }
//! ```
//!
//! What the guest gives back meanwhile, by a balloon or by reporting free pages, is [forgotten](SlotGuard::forget) under the
//! guard before it is discarded, and not filled again. Memory that is registered with userfaultfd while a run goes on is
//! registered under the guard: the engine looks at it anew then. A populate that meets such memory unprepared waits for its
//! handler, and where that never answers nothing but SIGKILL ends it.
//!
//! # What is left alone
//!
//! Before it touches memory the engine looks at what that is, where `/proc` can be read. A userfaultfd handler's pages are
//! the handler's to give. Of a file on disk that is mapped shared, data is read and holes stay holes: a write would allocate
//! them there. Slots whose dirty pages KVM logs can't be seen; a VMM that logs says so
//! ([`Engine::dirty_logged`]), or its next snapshot of what changed has everything in it.
//!
//! # What comes first
//!
//! A [`Plan`]'s order is the caller's. [`working_set`] records what a guest touches, keeps it in a file, and puts the next
//! VM's memory in that order.
//!
//! # What there is to take
//!
//! A guest may be larger than what the host, or a cgroup above the VMM, can give. It lives as long as it does not touch it
//! all; a run that makes it all present has the VMM killed. [`Budget::within_host_memory`] keeps a run within what there
//! is, and names the limit in the report:
//!
//! ```no_run
//! # fn premap(plan: &premap::Plan, vcpus: &mut [premap::kvm::linux::Vcpu<std::os::fd::OwnedFd>]) -> Result<(), premap::Error> {
//! use premap::{Budget, Engine};
//!
//! let report = Engine::new().budget(Budget::within_host_memory()).run(plan, vcpus)?;
//! if let Some(limit) = &report.limit {
//!     eprintln!("{} bytes are left to the guest's faults, because of {limit}", report.host.abandoned);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What a VMM must allow
//!
//! [`seccomp`] has the system calls of each mode, as a table and as data for a filter. The engine needs no `/proc`.

// The README's example must compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

mod alarm;
mod background;
mod bell;
mod budget;
mod clock;
mod control;
mod dirty_log;
mod engine;
mod forgotten;
mod gate;
mod hole;
mod host_stage;
mod interrupt;
mod mappings;
mod memory;
mod muster;
mod pace;
mod patience;
mod pipeline;
mod plan;
mod progress;
mod report;
mod room;
mod run;
pub mod seccomp;
mod second_stage;
mod survey;
mod tally;
#[cfg(feature = "td")]
pub mod td;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
mod watchdog;
pub mod working_set;

pub use background::Background;
pub use budget::{Budget, HostMemory, Stop};
pub use engine::{DEFAULT_PATIENCE, Engine, Error, Stages};
pub use gate::{Gate, SlotGuard};
pub use memory::{Backing, Region, Touch};
pub use pace::Pace;
pub use plan::{BACKGROUND_CHUNK, DEFAULT_CHUNK, Plan, PlanError};
pub use premap_address::{Gpa, GpaRange, Hva, PageSize, RangeError};
pub use premap_address_space::limits::LimitKind as HostLimit;
/// What a VMM lends to the engine: KVM's ioctls as traits, and [`linux`](kvm::linux) for `/dev/kvm`.
pub use premap_kvm as kvm;
pub use progress::Progress;
pub use report::{BlamedFile, Fate, PageCounts, Reason, Report, Stage, StageReport, Unmapped, Unsupported};
