//! The flags that choose the guest, and those of the Linux guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use premap_linux_guest::{Image, Until};

use crate::failure::BadUse;
use crate::files::{self, Kind};
use crate::size::duration;

/// What the flags fall back to.
const KERNEL: &str = "PREMAP_GUEST_KERNEL";
const INITRD: &str = "PREMAP_GUEST_INITRD";
const MARKER: &str = "PREMAP_GUEST_MARKER";
/// A console, few words, a reboot instead of a halt after a panic, no bus that is not there, and the kernel at the same
/// place at every boot: else a recorded working set would be another boot's.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off nokaslr";
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// What runs in the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Guest {
    /// A guest that touches the first word of every page
    #[default]
    FirstTouch,
    /// Linux, up to a line on its console; needs /dev/kvm
    Linux,
}

/// Which guest, and what a Linux guest boots.
#[derive(Clone, Debug, Default, Args)]
#[group(skip)]
pub(crate) struct Flags {
    /// What runs in the machine
    #[arg(long, value_enum, default_value_t)]
    pub(crate) guest: Guest,
    /// Linux guest: the kernel, a bzImage such as /boot/vmlinuz [env: PREMAP_GUEST_KERNEL]
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<PathBuf>,
    /// Linux guest: the initramfs [env: PREMAP_GUEST_INITRD, together with the kernel's]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Linux guest: the kernel's command line [default: "console=ttyS0 quiet panic=-1 pci=off nokaslr"]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Linux guest: what its console shows when it is up; without it the guest must power off [env: PREMAP_GUEST_MARKER]
    #[arg(long, value_name = "TEXT")]
    marker: Option<String>,
    /// Linux guest: how long it may take, as 90s or 5m [default: 300s]
    #[arg(long, value_name = "TIME", value_parser = duration, allow_negative_numbers = true)]
    time_limit: Option<Duration>,
    /// Linux guest: where what its console showed is written, of the last boot
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
}

impl Flags {
    /// Refuses flags of the Linux guest where another runs.
    pub(crate) fn check(&self) -> Result<(), BadUse> {
        let given = [
            ("--kernel", self.kernel.is_some()),
            ("--initrd", self.initrd.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--marker", self.marker.is_some()),
            ("--time-limit", self.time_limit.is_some()),
            ("--console", self.console.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given && self.guest != Guest::Linux) {
            Some((flag, _)) => Err(BadUse(format!(
                "{flag}: only the Linux guest has it; add --guest linux, or leave it away"
            ))),
            None => Ok(()),
        }
    }

    /// Reads what is to be booted.
    pub(crate) fn image(&self) -> anyhow::Result<Image> {
        self.image_in(|name| std::env::var_os(name))
    }

    fn image_in(&self, environment: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<Image> {
        let default = |name| environment(name).map(PathBuf::from);
        let kernel = self.kernel.clone().or_else(|| default(KERNEL)).ok_or_else(|| {
            BadUse(format!(
                "--guest linux: needs a kernel; give --kernel BZIMAGE, such as /boot/vmlinuz, or set {KERNEL}"
            ))
        })?;
        // The default initramfs belongs to the default kernel.
        let initrd = self.initrd.clone().or_else(|| default(INITRD).filter(|_| self.kernel.is_none()));
        let initrd_bytes = initrd.as_ref().map(|path| read("--initrd", path, Kind::INITRAMFS)).transpose()?;
        let cmdline = self.cmdline.as_deref().unwrap_or(CMDLINE);
        let image = Image::new(read("--kernel", &kernel, Kind::KERNEL)?, initrd_bytes, cmdline);
        Ok(image.map_err(|error| BadUse(format!("--kernel {}: {error}", kernel.display())))?)
    }

    /// Up to where the guest runs.
    pub(crate) fn until(&self) -> Until {
        let marker = self.marker.clone().or_else(|| std::env::var(MARKER).ok());
        Until {
            marker: marker.filter(|marker| !marker.is_empty()),
            limit: self.time_limit.unwrap_or(TIME_LIMIT),
        }
    }
}

fn read(flag: &str, path: &Path, kind: Kind) -> anyhow::Result<Vec<u8>> {
    files::read(path, &format!("{flag} {}", path.display()), kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_initramfs_goes_with_the_default_kernel_alone() {
        let environment = |name: &str| (name == INITRD).then(|| "/nowhere/initramfs".into());
        let flags = Flags { kernel: Some("/nowhere/vmlinuz".into()), ..Flags::default() };
        let error = format!("{:#}", flags.image_in(environment).unwrap_err());
        assert!(error.starts_with("--kernel /nowhere/vmlinuz: "), "{error}");
        let both = |_: &str| Some("/nowhere/file".into());
        let error = format!("{:#}", Flags::default().image_in(both).unwrap_err());
        assert!(error.starts_with("--initrd /nowhere/file: "), "{error}");
    }
}
