//! The library that `premap exec` preloads into a VMM: it watches the VMM make its VM, and maps the VM's memory before
//! the guest runs. The VMM is not changed and is not told.
//!
//! ```text
//!   VMM's threads                                       premap's threads
//!     ioctl(KVM_...)  ──> interpose ──> watch              |
//!       slots, vCPUs are noted            |                |
//!       KVM_RUN: is mapping due? ───── entry ── hand ──> task: memory ──> plan ──> engine ──> report
//!         waits until it is done <─────────────────────────┘
//!         passes on to the kernel
//! ```
//!
//! # What it promises the VMM
//!
//! - **Nothing is added to a process that makes no VM** but a look at its environment: one comparison of the request number
//!   for each `ioctl`, one load for each `close`, one comparison of the result for each thread. Threads are started at the
//!   first call that only KVM's users make.
//! - **Every call reaches the kernel**, as it was made, and its result and errno come back as the kernel gave them; once,
//!   but where it failed for want of a thread. Then the library gives up its own and the call is made again.
//! - **A vCPU is given back when it is wanted.** A signal ends the wait for a run as it ends `KVM_RUN`, with EINTR.
//! - **Nothing here ends the VMM.** Where something fails, one line on stderr says so and the library steps aside: the VM
//!   runs as it would without. No panic leaves the library.
//! - **VMs are not kept alive.** Descriptors are duplicated for the time of one run and closed.
//! - **Forks are followed.** A child has its parent's environment, so its own programs are watched; a child's state
//!   starts empty, since a parent's VM is of no use in a child (KVM says EIO). A child that shares the memory, and not the
//!   descriptors, changes nothing of its parent's.
//!
//! # When it maps, and what
//!
//! `phase` has the rules: at the VM's first `KVM_RUN`, and again once the slots have come to rest after a change, since
//! deleting a slot throws the VM's mappings away. `memory` says what is behind the slots, and `given` what of it the guest
//! was given. A writable slot above 4 GiB that comes later, with new memory, is left: of virtio-mem's, only blocks are
//! plugged, and a DIMM's can't be told from it. Where it lies in memory that was left at the start, it is left still.
//!
//! # Seccomp
//!
//! A filter may kill a process for a call that it does not list, and VMMs confine their threads, often after opening
//! `/dev/kvm`. So all that a filter might not know is done on threads started before (`helper`), and threads of the VMM
//! only take locks and wait. `seccomp` says how confinement is noticed without risking a call.
//!
//! # Threads
//!
//! A thread that must be there before a filter is laid is there while the VMM starts its own. The two promises meet so: the
//! library's two threads are started once, when the VMM has just opened `/dev/kvm`. The engine's stays for as long as there
//! may be runs; the other stays, to start it again for the next VM, and to tell. Both go at once where the VMM lacks one.
//! Then nothing more is mapped in the process, since a new thread might be started under a filter.
//!
//! # What it does not see
//!
//! Calls that do not go through the C library's functions: statically linked VMMs, and programs that make the system call
//! themselves, as Rust's rustix does. VMMs on kvm-ioctls or on libc do not. What a process counted is lost when it ends by a
//! signal or by `_exit`. A handler that sets no `immediate_exit`, and runs in the moment between two waits, is not noticed:
//! VMMs that rely on it send their signal again, as they must with the kernel's `KVM_RUN`. Signals that a VMM blocks
//! but for `KVM_RUN` (`KVM_SET_SIGNAL_MASK`) end no wait.

mod absence;
mod account;
mod boot;
mod closing;
mod descriptors;
mod entry;
mod events;
mod given;
mod helper;
mod interpose;
mod interpose_exec;
mod interpose_spawn;
mod kvm;
mod memory;
mod next;
mod outlet;
mod phase;
mod process;
mod request;
mod run_page;
mod say;
mod seccomp;
mod shortfall;
mod signals;
mod task;
mod turn;
mod vms;
mod watch;
