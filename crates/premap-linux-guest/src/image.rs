//! What a guest boots: a kernel, an initramfs and a command line.

use linux_loader::loader::bootparam::setup_header;
use sha2::{Digest, Sha256};
use vm_memory::ByteValued;

use crate::error::ImageError;

/// Where a bzImage has its header.
const HEADER: usize = 0x1f1;
/// `HdrS`
const MAGIC: u32 = 0x5372_6448;
/// The boot protocol that told of the 64-bit entry.
const PROTOCOL: u16 = 0x020c;
/// More guest-physical addresses than 52 bits can't be had on x86.
const ADDRESSES: u64 = 1 << 52;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;

/// A kernel that can be booted, with its initramfs and command line.
#[derive(Clone)]
pub struct Image {
    pub(crate) kernel: Vec<u8>,
    pub(crate) header: setup_header,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) cmdline: String,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("cmdline", &self.cmdline).finish_non_exhaustive()
    }
}

impl Image {
    /// Takes the bytes of a bzImage and of an initramfs, and checks what can be checked of them.
    ///
    /// # Errors
    /// No bzImage, a part of one, a kernel without a 64-bit entry, or a command line that it would not take.
    pub fn new(kernel: Vec<u8>, initrd: Option<Vec<u8>>, cmdline: &str) -> Result<Self, ImageError> {
        let bytes = kernel.get(HEADER..HEADER + size_of::<setup_header>()).ok_or(ImageError::NotBzImage)?;
        let header = *setup_header::from_slice(bytes).ok_or(ImageError::NotBzImage)?;
        if header.header != MAGIC || header.loadflags & LOADED_HIGH == 0 {
            return Err(ImageError::NotBzImage);
        }
        if header.version < PROTOCOL || header.xloadflags & KERNEL_64 == 0 {
            return Err(ImageError::No64BitEntry);
        }
        // No setup sectors mean four, for the oldest loaders' sake; the boot sector comes on top.
        let setup = match header.setup_sects {
            0 => 5,
            sectors => u64::from(sectors) + 1,
        };
        let expected = setup * SECTOR + u64::from(header.syssize) * 16;
        if (kernel.len() as u64) < expected {
            return Err(ImageError::Truncated { bytes: kernel.len() as u64, expected });
        }
        let (address, bytes) = (header.pref_address, u64::from(header.init_size));
        if address.checked_add(bytes).is_none_or(|end| end > ADDRESSES) {
            return Err(ImageError::Unpacked { address, bytes });
        }
        if cmdline.contains('\0') {
            return Err(ImageError::NulInCommandLine);
        }
        let limit = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX).min(0xffff);
        if cmdline.len() > limit {
            return Err(ImageError::CommandLine { length: cmdline.len(), limit });
        }
        Ok(Self { kernel, header, initrd, cmdline: cmdline.to_owned() })
    }

    /// A digest of everything that makes one boot of this image like another on the same machine.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        let initrd = self.initrd.as_deref().unwrap_or_default();
        for part in [self.kernel.as_slice(), initrd, self.cmdline.as_bytes()] {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        digest.finalize().into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest file that passes for a kernel: header fields by hand, and a body of `bytes` zeros.
    pub(crate) fn kernel(bytes: u64) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            syssize: u32::try_from(bytes / 16).unwrap(),
            header: MAGIC,
            version: 0x020f,
            loadflags: LOADED_HIGH,
            code32_start: 0x10_0000,
            initrd_addr_max: 0x7fff_ffff,
            xloadflags: KERNEL_64,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x100_0000,
            ..Default::default()
        };
        let mut file = vec![0; 1024 + usize::try_from(bytes).unwrap()];
        file[HEADER..HEADER + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        file
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Vec<u8>), cmdline: &str, expected: &ImageError) {
        let mut file = kernel(4096);
        change(&mut file);
        assert_eq!(&Image::new(file, None, cmdline).unwrap_err(), expected);
    }

    #[test]
    fn what_is_no_kernel_is_told_apart() {
        check(|file| *file = b"\x7fELF".repeat(512), "", &ImageError::NotBzImage);
        check(Vec::clear, "", &ImageError::NotBzImage);
        check(|file| file.truncate(0x210), "", &ImageError::NotBzImage);
        check(|file| file[0x202] = b'h', "", &ImageError::NotBzImage);
        check(|file| file[0x236] = 0, "", &ImageError::No64BitEntry);
        check(|file| file.truncate(5000), "", &ImageError::Truncated { bytes: 5000, expected: 5120 });
        // pref_address, so high that init_size leads past 2^64.
        check(
            |file| file[0x258..0x260].fill(0xff),
            "",
            &ImageError::Unpacked { address: u64::MAX, bytes: 0x100_0000 },
        );
        check(|_| (), "a\0b", &ImageError::NulInCommandLine);
        check(|_| (), &"x".repeat(2048), &ImageError::CommandLine { length: 2048, limit: 2047 });
        assert!(Image::new(kernel(4096), None, &"x".repeat(2047)).is_ok());
    }

    #[test]
    fn the_digest_knows_every_part_and_where_it_ends() {
        let digest = |initrd: &[u8], cmdline: &str| {
            Image::new(kernel(64), Some(initrd.to_vec()), cmdline).unwrap().digest()
        };
        assert_eq!(digest(b"ab", "c"), digest(b"ab", "c"));
        assert_ne!(digest(b"ab", "c"), digest(b"a", "bc"));
        assert_ne!(digest(b"ab", "c"), Image::new(kernel(128), Some(b"ab".to_vec()), "c").unwrap().digest());
    }
}
