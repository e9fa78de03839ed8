//! A QEMU that emulates a processor with nested paging.
//!
//! One that the machine has is used if it is new enough. Otherwise Debian's packages are unpacked under
//! `target/lab/qemu` with the libraries that the machine lacks, and run from there: nothing is installed, and root
//! isn't needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Origin, fresh_directory};
use super::note;

pub(super) const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// Before this version, emulated processors in threads of their own crashed guest kernels that patch their text.
const PARALLEL_SINCE: (u32, u32) = (8, 2);

/// A QEMU that runs on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    /// Where the packages were unpacked; `None` for the system's own.
    root: Option<PathBuf>,
    version: (u32, u32),
}

impl Qemu {
    /// Returns the system's QEMU or the one unpacked before, if either will do.
    pub(super) fn present(lab: &Path) -> Option<Self> {
        let system = Self::probe(None).ok().filter(Self::is_parallel);
        system.or_else(|| Self::probe(Some(directory(lab))).ok())
    }

    /// Downloads and unpacks QEMU.
    pub(super) fn obtain(lab: &Path, apt: &Apt) -> Result<Self> {
        let fresh = lab.join("qemu-new");
        fresh_directory(&fresh)?;
        // The release's own is preferred, as the one that sees the most use.
        let own = apt.candidate(PACKAGE)?.and_then(|version| numbers(&version));
        let origin = if own >= Some(PARALLEL_SINCE) { Origin::Release } else { Origin::Backports };
        apt.unpack_with_dependencies(PACKAGE, origin, &fresh)?;
        let root = directory(lab);
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::rename(fresh, &root)?;
        let qemu = Self::probe(Some(root)).context(
            "the QEMU that was downloaded does not run; remove target/lab/qemu, or install qemu-system-x86",
        )?;
        let (major, minor) = qemu.version;
        note!("QEMU {major}.{minor} unpacked under target/lab/qemu");
        if !qemu.is_parallel() {
            note!(
                "QEMU {major}.{minor} is old: processors are emulated one at a time, so times in parallel mean nothing"
            );
        }
        Ok(qemu)
    }

    /// A command that starts this QEMU, with its libraries and firmware found.
    pub(super) fn command(&self) -> Command {
        let Some(root) = &self.root else {
            return Command::new(PROGRAM);
        };
        let mut command = Command::new(root.join("usr/bin").join(PROGRAM));
        let libraries: Vec<_> = LIBRARIES.iter().map(|path| root.join(path).display().to_string()).collect();
        command
            .env("LD_LIBRARY_PATH", libraries.join(":"))
            .env("QEMU_MODULE_DIR", root.join(LIBRARIES[0]).join("qemu"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(firmware));
        }
        command
    }

    /// Where the packages were unpacked; `None` for the system's own.
    pub(super) fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// The version, as its first two numbers.
    pub(crate) fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The accelerator's argument: processors in parallel where that is safe.
    pub(super) fn accelerator(&self) -> &'static str {
        if self.is_parallel() { "tcg,thread=multi" } else { "tcg,thread=single" }
    }

    fn is_parallel(&self) -> bool {
        self.version >= PARALLEL_SINCE
    }

    fn probe(root: Option<PathBuf>) -> Result<Self> {
        let mut qemu = Self { root, version: (0, 0) };
        let output =
            qemu.command().arg("--version").output().with_context(|| format!("cannot run {PROGRAM}"))?;
        if !output.status.success() {
            bail!("{PROGRAM} --version failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let text = String::from_utf8_lossy(&output.stdout);
        qemu.version = parse_version(&text).with_context(|| format!("{PROGRAM} tells no version: {text}"))?;
        Ok(qemu)
    }
}

fn directory(lab: &Path) -> PathBuf {
    lab.join("qemu")
}

/// Reads the version from the banner of `--version`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    numbers(text.split_whitespace().skip_while(|word| *word != "version").nth(1)?)
}

/// Reads the first two numbers of a version such as `10.0.2` or `7.2+dfsg-7`.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split(|sign: char| !sign.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_banner() {
        let check = |text: &str, expected| assert_eq!(parse_version(text), expected, "{text}");
        check("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", Some((10, 0)));
        check("QEMU emulator version 8.2.50", Some((8, 2)));
        check("something else", None);
    }

    #[test]
    fn the_first_two_numbers_of_a_package_version_count() {
        let check = |text: &str, expected| assert_eq!(numbers(text), expected, "{text}");
        check("7.2+dfsg-7+deb12u18", Some((7, 2)));
        check("10.0.2+ds-2+deb13u1~bpo12+1", Some((10, 0)));
        check("none", None);
    }
}
