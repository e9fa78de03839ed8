//! Puts a kernel into memory as Linux's 64-bit boot protocol has it.
//!
//! Source of offsets and limits: the kernel's `Documentation/arch/x86/boot.rst`.

use std::io::Cursor;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use premap_address::{Gpa, PAGE_SIZE};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::error::{ImageError, LinuxGuestError};
use crate::image::Image;
use crate::layout::{ACPI, BOOT_PARAMETERS, COMMAND_LINE, HOLE, KERNEL, LOW_END};
use crate::ram::Ram;

/// The 64-bit entry lies so far behind where the kernel was loaded.
const ENTRY_OFFSET: u64 = 0x200;
/// A loader without a number of its own.
const LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;

/// Loads the image and gives the address of its entry.
pub(crate) fn load(image: &Image, ram: &Ram) -> Result<Gpa, LinuxGuestError> {
    let initrd = place_initrd(image, ram.parts().map(|(_, bytes)| bytes).sum())?;
    ram.with(|memory| {
        let kernel = &mut Cursor::new(image.kernel.as_slice());
        let himem = Some(GuestAddress(KERNEL.raw()));
        let loaded = BzImage::load(memory, himem, kernel, himem).map_err(|_| ImageError::NotBzImage)?;
        write(memory, COMMAND_LINE, format!("{}\0", image.cmdline).as_bytes())?;
        if let (Some(at), Some(bytes)) = (initrd, &image.initrd) {
            write(memory, at, bytes)?;
        }
        let parameters = parameters(image, ram, initrd);
        write(memory, BOOT_PARAMETERS, parameters.as_slice())?;
        Ok(Gpa::new(loaded.kernel_load.0 + ENTRY_OFFSET))
    })
}

pub(crate) fn write(memory: &GuestMemoryMmap, at: Gpa, bytes: &[u8]) -> Result<(), LinuxGuestError> {
    // What can be too long for the memory was measured before: this is the address space's own doing.
    memory.write_slice(bytes, GuestAddress(at.raw())).map_err(|_| LinuxGuestError::Os {
        what: "writing the guest's memory",
        errno: premap_kvm::Errno::FAULT,
    })
}

impl Image {
    /// Checks whether the image fits into so many bytes of memory.
    ///
    /// # Errors
    /// A kernel or an initramfs that does not.
    pub fn fits(&self, bytes: u64) -> Result<(), ImageError> {
        place_initrd(self, bytes).map(|_| ())
    }
}

/// Where the initramfs goes: as high as kernel and memory allow, clear of what the kernel unpacks itself into.
fn place_initrd(image: &Image, bytes: u64) -> Result<Option<Gpa>, ImageError> {
    let header = image.header;
    let low = bytes.min(HOLE.raw());
    // It unpacks itself at its preferred address, and moves there what was loaded.
    let needed = (header.pref_address.max(KERNEL.raw()) + u64::from(header.init_size))
        .max(KERNEL.raw() + image.kernel.len() as u64)
        .next_multiple_of(PAGE_SIZE);
    if needed > low {
        return Err(ImageError::Memory { bytes, needed });
    }
    let Some(initrd) = &image.initrd else { return Ok(None) };
    let length = initrd.len() as u64;
    let limit = low.min(u64::from(header.initrd_addr_max) + 1);
    let room = limit.saturating_sub(needed);
    match limit.checked_sub(length.next_multiple_of(PAGE_SIZE)).filter(|at| *at >= needed) {
        Some(at) => Ok(Some(Gpa::new(at & !(PAGE_SIZE - 1)))),
        None => Err(ImageError::Initrd { bytes: length, room }),
    }
}

/// The page that tells the kernel what it is given.
fn parameters(image: &Image, ram: &Ram, initrd: Option<Gpa>) -> boot_params {
    let low32 = |gpa: Gpa| u32::try_from(gpa.raw()).unwrap_or_default();
    let mut parameters = boot_params { hdr: image.header, acpi_rsdp_addr: ACPI.raw(), ..Default::default() };
    parameters.hdr.type_of_loader = LOADER;
    parameters.hdr.code32_start = low32(KERNEL);
    parameters.hdr.cmd_line_ptr = low32(COMMAND_LINE);
    if let (Some(at), Some(bytes)) = (initrd, &image.initrd) {
        parameters.hdr.ramdisk_image = low32(at);
        parameters.hdr.ramdisk_size = u32::try_from(bytes.len()).unwrap_or_default();
    }
    let mut entries = 0;
    for (gpa, bytes) in usable(ram) {
        let entry = boot_e820_entry { addr: gpa.raw(), size: bytes, r#type: E820_RAM };
        parameters.e820_table[usize::from(entries)] = entry;
        entries += 1;
    }
    parameters.e820_entries = entries;
    parameters
}

/// What the kernel may take for memory: all but the end of the first MiB, where firmware would be.
fn usable(ram: &Ram) -> Vec<(Gpa, u64)> {
    let mut usable = vec![(Gpa::new(0), LOW_END.raw())];
    for (gpa, bytes) in ram.parts() {
        let start = gpa.max(KERNEL);
        usable.push((start, gpa.raw() + bytes - start.raw()));
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;
    use premap_guest::Backing;

    const MIB: u64 = 1 << 20;

    /// The test's kernel unpacks itself into the 16 MiB from 16 MiB on.
    fn image(initrd: u64) -> Image {
        let initrd = vec![7; usize::try_from(initrd).unwrap()];
        Image::new(crate::image::tests::kernel(4096), Some(initrd), "quiet").unwrap()
    }

    #[test]
    fn what_does_not_fit_is_told_with_its_size() {
        let place = |memory, initrd| place_initrd(&image(initrd), memory);
        assert_eq!(
            place(16 * MIB, 1),
            Err(ImageError::Memory { bytes: 16 * MIB, needed: 32 * MIB }),
            "the kernel alone"
        );
        assert_eq!(place(34 * MIB, MIB + 1), Ok(Some(Gpa::new(33 * MIB - PAGE_SIZE))));
        assert_eq!(place(34 * MIB, 2 * MIB), Ok(Some(Gpa::new(32 * MIB))));
        let bytes = 2 * MIB + 1;
        assert_eq!(place(34 * MIB, bytes), Err(ImageError::Initrd { bytes, room: 2 * MIB }));
    }

    /// Each field that this loader reads, at its edges, in any combination, with the file's length besides.
    #[test]
    fn a_hostile_header_is_loaded_or_refused_and_nothing_else() {
        const FIELDS: [(usize, usize); 9] = [
            (0x1f1, 1), // setup_sects
            (0x1f4, 4), // syssize
            (0x206, 2), // version
            (0x211, 1), // loadflags
            (0x214, 4), // code32_start
            (0x22c, 4), // initrd_addr_max
            (0x238, 4), // cmdline_size
            (0x258, 8), // pref_address
            (0x260, 4), // init_size
        ];
        let ram = Ram::new(2 * MIB, Backing::Anonymous).unwrap();
        let mut state = 1_u64;
        // Knuth's MMIX generator, of which the high bits are the good ones.
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let (mut loaded, mut refused) = (0, 0);
        for _ in 0..20_000 {
            let mut file = crate::image::tests::kernel(4096);
            file[0x258..0x260].copy_from_slice(&MIB.to_le_bytes());
            file[0x260..0x264].copy_from_slice(&0x2000_u32.to_le_bytes());
            for _ in 0..=next(3) {
                let (at, bytes) = FIELDS[usize::try_from(next(9)).unwrap()];
                let value = [0, 1, u64::MAX, u64::MAX >> 1, 1 << next(64), u64::MAX << next(64)];
                let value = value[usize::try_from(next(6)).unwrap()].wrapping_sub(next(2));
                file[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
            }
            if next(8) == 0 {
                file.truncate(usize::try_from(next(5121)).unwrap());
            }
            let initrd = vec![7; [1, 4096, 1 << 20][usize::try_from(next(3)).unwrap()]];
            match Image::new(file, Some(initrd), "quiet").map(|image| load(&image, &ram)) {
                Ok(Ok(_)) => loaded += 1,
                Err(error) => refused += usize::from(!error.to_string().is_empty()),
                Ok(Err(error)) => refused += usize::from(!error.to_string().is_empty()),
            }
        }
        assert!(loaded > 100 && refused > 100 && loaded + refused == 20_000, "{loaded} {refused}");
    }

    #[test]
    fn the_kernel_is_told_of_memory_command_line_and_initramfs() {
        let ram = Ram::new((3 << 30) + MIB, Backing::Anonymous).unwrap();
        assert_eq!(load(&image(100), &ram).unwrap(), Gpa::new(0x10_0200));
        ram.with(|memory| {
            let page: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMETERS.raw())).unwrap();
            let (entries, table) = (page.e820_entries, page.e820_table);
            let told: Vec<_> = table[..usize::from(entries)].iter().map(|e| (e.addr, e.size)).collect();
            assert_eq!(told, [(0, 0x9_fc00), (MIB, (3 << 30) - MIB), (4 << 30, MIB)]);
            let (at, size) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size);
            assert_eq!((u64::from(at), size), ((2 << 30) - PAGE_SIZE, 100));
            let mut line = [0; 6];
            memory.read_slice(&mut line, GuestAddress(COMMAND_LINE.raw())).unwrap();
            assert_eq!(&line, b"quiet\0");
            Ok(())
        })
        .unwrap();
    }
}
