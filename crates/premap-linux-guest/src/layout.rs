//! What lies where in the guest.
//!
//! ```text
//!   0x500      segment descriptors           0xe0000    ACPI tables, reserved
//!   0x7000     boot parameters               0x100000   the kernel's image, as it was loaded
//!   0x9000     page tables, three pages      ...        initramfs, as high as the kernel takes it
//!   0x20000    command line                  3 GiB      devices; memory goes on at 4 GiB
//! ```

use premap_address::Gpa;

pub(crate) const DESCRIPTORS: Gpa = Gpa::new(0x500);
pub(crate) const BOOT_PARAMETERS: Gpa = Gpa::new(0x7000);
/// PML4, page-directory pointers, and a page directory: the first GiB.
pub(crate) const PAGE_TABLES: Gpa = Gpa::new(0x9000);
pub(crate) const COMMAND_LINE: Gpa = Gpa::new(0x2_0000);
/// The end of what the kernel may use of the first MiB.
pub(crate) const LOW_END: Gpa = Gpa::new(0x9_fc00);
/// In the range that kernels search for it.
pub(crate) const ACPI: Gpa = Gpa::new(0xe_0000);
pub(crate) const KERNEL: Gpa = Gpa::new(0x10_0000);
/// Where the hole for devices begins, and memory goes on.
pub(crate) const HOLE: Gpa = Gpa::new(3 << 30);
pub(crate) const ABOVE_HOLE: Gpa = Gpa::new(4 << 30);

/// Of the interrupt controllers, where KVM has them.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
