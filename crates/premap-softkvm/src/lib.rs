//! A KVM in user space: memslots, fault path, pre-faulting and statistics on real page tables.
//!
//! [`SoftVm`] and [`SoftVcpu`] implement the traits of premap-kvm, so that whatever maps and touches guest memory through
//! them runs where there is no `/dev/kvm`, or none with pre-faulting. It is faithful where a VMM can see: errnos and their
//! order, how far a range gets, faults and mappings counted, what a change of slots or of host memory takes away. The
//! releases of Linux that differ there are [`Profile`]s.
//!
//! ```text
//!   SoftVm ---- memslots ------ notifier (the VMM tells of changes behind its slots)
//!     |            |                |
//!     |            v                v
//!   SoftVcpu -> fault, prefault -> invalidation (sequence and retry)
//!     |            |                |
//!     |            v                v
//!     |          host            second_stage --> roots: real NPTs by role, walked and filled
//!     |   (/proc/self/pagemap)      |
//!     |                          shadow --> direct pages, and shadows of guests' tables
//!     +---- access: walks the table, touches the bytes
//! ```
//!
//! A vCPU's [mode](CpuMode) and the VM's [`Tdp`] decide which MMU maps for it (`mmu`), and that decides whether it can be
//! pre-faulted.
//!
//! A VM can have private memory beside: `private` has guest_memfd, attributes and conversions, and [`tdx`] the VMs whose
//! private memory a modelled TDX module keeps.
//!
//! Guest memory is the VMM's own, of any backing. The frame in a second-stage leaf is the host-*virtual* frame
//! (`hva >> 12`), for that is what user space can reach; what the host's page tables hold is asked of its kernel.

mod access;
mod config;
mod frames;
mod host;
mod invalidation;
mod loaded;
mod machine;
mod memslots;
mod mmio;
mod mmu;
mod mode;
mod notifier;
mod page;
mod private;
mod profile;
mod role;
mod roots;
mod second_stage;
mod shadow;
mod signals;
mod srcu;
mod stats;
pub mod tdx;
mod vcpu;
mod vm;

pub use config::{PhysicalBits, SoftConfig, SpecialModes, Tdp, TdpLevels, VmType};
pub use mode::CpuMode;
pub use notifier::{Invalidation, Notifier};
pub use private::{GuestMemfd, MemoryFault};
pub use profile::{Profile, UnknownProfile};
pub use vcpu::{GuestFault, SoftVcpu};
pub use vm::SoftVm;
