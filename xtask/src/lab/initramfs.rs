//! What the lab boots into: busybox, the kernel modules, the binaries to run, a guest to boot, and `init.sh`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::guest;
use super::kernel::Kernel;
use super::machine::Parameter;
use super::modules;

const INIT: &str = include_str!("init.sh");

/// A file of the host that the guest finds under `name` on its search path.
#[derive(Clone, Debug)]
pub(crate) struct GuestFile {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl GuestFile {
    /// Takes the program at `path` under its own file name.
    pub(crate) fn from_host(path: &Path) -> Result<Self> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} has no file name in UTF-8", path.display()))?.to_owned();
        Ok(Self { name, path: path.to_owned() })
    }
}

/// Builds the archive for one boot, whose modules are loaded with these parameters.
pub(super) fn build(
    busybox: &Path,
    kernel: &Kernel,
    parameters: &[Parameter],
    files: &[GuestFile],
) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "guest", "lab", "modules", "proc", "root", "run", "sys", "tmp"] {
        archive.directory(directory)?;
    }
    archive.executable("init", INIT.as_bytes())?;
    archive.executable("bin/busybox", &read(busybox)?)?;
    archive.symlink("bin/sh", "busybox")?;
    let mut unknown = parameters.to_vec();
    let mut all_known = Vec::new();
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let content = read(module)?;
        let known = modules::parameters(&content);
        let (its_own, others) =
            unknown.into_iter().partition(|given: &Parameter| known.contains(&given.name));
        unknown = others;
        archive.executable(&format!("modules/{name}"), &content)?;
        let its_own: Vec<_> = its_own.iter().map(Parameter::to_string).collect();
        archive.executable(&format!("modules/{name}.parameters"), its_own.join(" ").as_bytes())?;
        all_known.extend(known);
    }
    if let Some(unknown) = unknown.first() {
        let (name, all) = (&unknown.name, all_known.join(", "));
        bail!("Linux {} has no module parameter {name} of KVM; it has {all}", kernel.release);
    }
    archive.executable(&guest::KERNEL[1..], &read(&kernel.image)?)?;
    archive.executable(&guest::INITRAMFS[1..], &guest::initramfs(busybox)?)?;
    for file in files {
        let content = read(&file.path)?;
        if is_dynamic(&content) {
            let path = file.path.display();
            bail!(
                "{path} is linked dynamically and cannot run in the lab; link it statically (-C target-feature=+crt-static)"
            );
        }
        archive.executable(&format!("lab/{}", file.name), &content)?;
    }
    archive.finish()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Tells whether these are the bytes of a 64-bit ELF program that asks for a dynamic loader.
fn is_dynamic(program: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let field = |at: usize, size: usize| -> Option<u64> {
        let bytes = program.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let headers = || {
        let (first, size, count) = (field(0x20, 8)?, field(0x36, 2)?, field(0x38, 2)?);
        let kinds = (0..count).map(|at| field(usize::try_from(first.checked_add(at * size)?).ok()?, 4));
        Some(kinds.flatten().any(|kind| kind == PT_INTERP))
    };
    program.starts_with(b"\x7fELF\x02") && headers().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_program_with_a_loader_is_dynamic() {
        // An ELF header with one program header, right behind it, of the given kind.
        let program = |kind: u8| {
            let mut bytes = vec![0; 0x40 + 56];
            bytes[..5].copy_from_slice(b"\x7fELF\x02");
            (bytes[0x20], bytes[0x36], bytes[0x38], bytes[0x40]) = (0x40, 56, 1, kind);
            bytes
        };
        assert!(is_dynamic(&program(3)));
        assert!(!is_dynamic(&program(1)));
        assert!(!is_dynamic(b"#!/bin/sh\n"));
        assert!(!is_dynamic(b"\x7fELF\x02"));
    }
}
