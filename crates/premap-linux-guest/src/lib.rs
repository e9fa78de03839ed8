//! A small machine that boots Linux on `/dev/kvm`, up to a line on its console.
//!
//! It shows on a real operating system what mapping memory ahead saves. The machine has what Linux cannot do without and
//! nothing else: memory, vCPUs, the interrupt controllers and timer inside KVM, a serial console, and ACPI tables that tell
//! of the vCPUs and of the way to power off. No register of it is reached through memory, so that every fault that KVM
//! takes for the guest is one of its own memory, but for a handful at the interrupt controllers.
//!
//! ```text
//!   Image --> LinuxMachine: memory, load, acpi, vCPUs --> lend to an engine --> boot: vCPU threads, ports --> Boot
//! ```
//!
//! ```no_run
//! use std::time::Duration;
//! use premap_guest::{Backing, Linux};
//! use premap_linux_guest::{Image, LinuxMachine, Shape, Until};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = Image::new(std::fs::read("vmlinuz")?, Some(std::fs::read("initramfs")?), "console=ttyS0 quiet")?;
//! let shape = Shape { bytes: 256 << 20, backing: Backing::Anonymous, vcpus: 1, spares: 0 };
//! let mut machine = LinuxMachine::new(&Linux::open()?, &image, &shape)?;
//! let boot = machine.boot(&Until { marker: Some("login:".into()), limit: Duration::from_secs(60) })?;
//! println!("{:?} after {:?} and {} faults", boot.end, boot.elapsed, boot.cost.faults);
//! # Ok(())
//! # }
//! ```

mod acpi;
mod console;
mod cpu;
mod error;
mod image;
mod layout;
mod load;
mod machine;
mod ports;
mod ram;
mod vcpu;

pub use error::{ImageError, LinuxGuestError};
pub use image::Image;
pub use machine::{Boot, Lent, LinuxMachine, MAX_VCPUS, Shape, Spare};
pub use vcpu::{End, Until};
