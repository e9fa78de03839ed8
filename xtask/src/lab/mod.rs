//! The lab: real kernels on an emulated processor that has nested paging, for machines without one.
//!
//! QEMU emulates AMD's SVM with nested paging in software. In it a stock Debian cloud kernel is a KVM host like any
//! other, with the TDP MMU and the pre-fault ioctl. Counts taken there are exact; times are emulated, so that only
//! ratios within one boot mean anything.
//!
//! ```text
//!   apt's own configuration ──> sources ──> apt ──┬─> qemu      cached under target/lab, under a lock
//!                                                 ├─> kernel ──> modules
//!                                                 ├─> source ──> kernel, built
//!                                                 └─> busybox
//!   cargo ──> binaries ──> initramfs ──> boot ──> job, job, ...  a directory for each run
//! ```
//!
//! Everything is taken from Debian's archives with the machine's own configuration, and nothing is installed. To start
//! anew, for newer kernels say, remove `target/lab`. The kernel called `private` alone is built on this machine, from
//! Debian's source, and only for who asks for it.

mod apt;
pub(crate) mod binaries;
pub(crate) mod boot;
mod command;
mod console;
mod cpio;
pub(crate) mod guest;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod machine;
mod modules;
pub(crate) mod nested;
mod qemu;
mod source;
mod sources;
mod stream;
mod version;

use std::cell::OnceCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

pub(crate) use command::{Options, environment, run_command};

use apt::{Apt, Suites};
use kernel::{Kernel, Line};
use qemu::Qemu;

/// Says something about the lab, on standard error: standard output is the guest command's.
macro_rules! note {
    ($($text:tt)*) => { eprintln!("lab: {}", format_args!($($text)*)) };
}
pub(crate) use note;

/// What every boot needs, at hand.
pub(crate) struct Lab {
    /// `target/lab`.
    pub(crate) directory: PathBuf,
    /// A kernel for each line that was asked for, in that order.
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) qemu: Qemu,
    busybox: PathBuf,
}

impl Lab {
    /// Obtains what isn't there yet. Of several processes, one does it and the others wait.
    ///
    /// # Errors
    ///
    /// An error means that the lab can't run on this machine as it is, and says why.
    pub(crate) fn prepare(lines: &[Line]) -> Result<Self> {
        if std::env::consts::ARCH != "x86_64" {
            bail!(
                "the lab's kernels and binaries are for x86-64, and this machine is {}",
                std::env::consts::ARCH
            );
        }
        let directory = crate::workspace().join("target/lab");
        fs::create_dir_all(directory.join("run"))
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let lock = File::create(directory.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive).context("cannot lock target/lab/lock")?;
        remove_abandoned_runs(&directory);

        // apt is asked only when something is missing.
        let state = OnceCell::new();
        let apt = || -> Result<&Apt> {
            if state.get().is_none() {
                // Nothing else sets the cell, so the value always goes in.
                let _ = state.set(Apt::prepare(&directory)?);
            }
            state.get().context("the apt state was just made")
        };
        let qemu = match Qemu::present(&directory) {
            Some(qemu) => qemu,
            None => Qemu::obtain(&directory, apt()?)?,
        };
        let busybox = directory.join("busybox");
        if !busybox.exists() {
            obtain_busybox(&directory, apt()?, &busybox)?;
        }
        let mut kernels = Vec::new();
        for line in lines {
            kernels.push(match Kernel::pinned(&directory, line) {
                Some(kernel) => kernel,
                None => Kernel::obtain(&directory, apt()?, line)?,
            });
        }
        Ok(Self { directory, kernels, qemu, busybox })
    }

    /// Makes a directory for one boot.
    fn run_directory(&self) -> Result<PathBuf> {
        static BOOTS: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}", std::process::id(), BOOTS.fetch_add(1, Ordering::Relaxed));
        let directory = self.directory.join("run").join(name);
        apt::fresh_directory(&directory)?;
        Ok(directory)
    }
}

fn obtain_busybox(lab: &Path, apt: &Apt, to: &Path) -> Result<()> {
    let root = lab.join("busybox-package");
    apt::fresh_directory(&root)?;
    apt.unpack(Suites::Host, "busybox-static", &root)?;
    let program = ["usr/bin/busybox", "bin/busybox"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| path.is_file());
    fs::rename(program.context("the package busybox-static has no busybox")?, to)?;
    fs::remove_dir_all(root)?;
    Ok(())
}

/// Removes what killed processes left behind.
fn remove_abandoned_runs(lab: &Path) {
    for entry in fs::read_dir(lab.join("run")).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.split('-').next()).unwrap_or_default();
        if !Path::new("/proc").join(process).exists() {
            // A directory that can't be removed only takes up space.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
