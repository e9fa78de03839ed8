//! The Linux that the lab's own VMMs boot: the lab's kernel, and a small initramfs with an init of its own.
//!
//! It lies in every boot, where `init.sh` tells `premap run --guest linux` of it.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::cpio::Archive;

const INIT: &str = include_str!("guest-init.sh");

/// The line by which the guest's console tells that it is up.
pub(crate) const MARKER: &str = "premap-guest-is-up";
/// Its kernel and initramfs in the lab.
pub(crate) const KERNEL: &str = "/guest/vmlinuz";
pub(crate) const INITRAMFS: &str = "/guest/initramfs";

/// Builds the guest's initramfs.
pub(super) fn initramfs(busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "proc", "tmp"] {
        archive.directory(directory)?;
    }
    archive.executable("init", INIT.as_bytes())?;
    archive.executable("bin/busybox", &fs::read(busybox)?)?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_says_the_marker_and_the_lab_tells_of_the_guest() {
        assert!(INIT.contains(&format!("echo {MARKER}\n")));
        let lab = include_str!("init.sh");
        for setting in [
            format!("PREMAP_GUEST_KERNEL={KERNEL}"),
            format!("PREMAP_GUEST_INITRD={INITRAMFS}"),
            format!("PREMAP_GUEST_MARKER={MARKER}"),
        ] {
            assert!(lab.contains(&setting), "{setting}");
        }
    }
}
