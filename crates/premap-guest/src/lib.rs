//! Small machines with a guest that touches memory on request, on /dev/kvm and on the software KVM.
//!
//! A [`Machine`] is a VM, its vCPUs and the memory in its slots, on any [`Kernel`]: one body of a test or a measurement
//! runs on all of them. Its guest does one thing, a [`Touch`]: on `/dev/kvm` as real x86-64 code in long mode, on the
//! software KVM as the same sequence of accesses. What the host paid for it is in the [`Run`] that comes back.
//!
//! ```no_run
//! use premap_address::{Gpa, GpaRange};
//! use premap_guest::{Access, Backing, Linux, Machine, Memory, Order, SlotFlags, Touch};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut machine = Machine::new(&Linux::open()?, 2)?;
//! let range = GpaRange::new(Gpa::new(4 << 30), 64 << 20);
//! machine.slots().add(range.start(), Memory::new(range.bytes(), Backing::Anonymous)?, SlotFlags::NONE)?;
//! let run = machine.touch(&Touch { range, access: Access::Write, order: Order::Random })?;
//! println!("{} faults, {} exits in {:?}", run.faults, run.exits, run.elapsed);
//! # Ok(())
//! # }
//! ```

mod backing;
mod error;
mod linux;
mod machine;
mod memory;
mod mode;
mod private;
mod slots;
mod soft;
mod td;
mod threads;
mod touch;

pub use backing::{Backing, UnknownBacking};
pub use error::{GuestError, MachineError, MemoryError};
pub use linux::{Borrowable, Linux, LinuxGuestMemfd, LinuxVcpu, LinuxVm, enter_long_mode, errno};
pub use machine::{Cost, Guest, Kernel, Lent, Machine, MachineVm, MappedPages, Run};
pub use memory::Memory;
pub use mode::Mode;
pub use premap_softkvm::MemoryFault;
pub use private::{FileOperation, GuestMemfd, PrivateMemory, VmType};
pub use slots::{Slot, SlotFlags, SlotId, Slots};
pub use soft::{Soft, SoftGuest, SoftMachineVm};
pub use td::{Acceptance, TdMachine};
pub use threads::no_thread;
pub use touch::{Access, Order, Slice, Touch, word_of};
