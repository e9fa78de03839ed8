//! What the lab's guest needs to run a VMM in it: Debian's QEMU, which is linked dynamically.
//!
//! The lab's own initramfs has static programs only. So QEMU goes in as an archive of its own, with the libraries that the
//! dynamic linker says it loads, and with firmware. A job unpacks it over the root directory.
//!
//! ```text
//!   /vmm/bin    qemu-system-x86_64, and the programs to go with it
//!   /vmm/lib    every library, flat; LD_LIBRARY_PATH names it
//!   /vmm/share  firmware
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Lab;
use super::cpio::Archive;
use super::initramfs::GuestFile;
use super::qemu::PROGRAM;

/// The archive's name on the lab's search path.
pub(crate) const ARCHIVE: &str = "vmm.cpio";

/// What QEMU loads to boot a kernel that it is given, from the packages qemu-system-data and seabios.
const FIRMWARE: [&str; 4] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot.bin", "linuxboot_dma.bin"];
const FIRMWARE_PLACES: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// Packs QEMU, and `programs` of this machine. Writes the archive to `to`.
pub(crate) fn pack(lab: &Lab, programs: &[PathBuf], to: &Path) -> Result<GuestFile> {
    let qemu = lab.qemu.command();
    let system = lab.qemu.root().is_none();
    let own = if system { which(PROGRAM)? } else { PathBuf::from(qemu.get_program()) };
    let mut files = BTreeMap::new();
    for program in programs.iter().chain([&own]) {
        let name = program.file_name().and_then(|name| name.to_str()).context("a program has no name")?;
        files.insert(format!("vmm/bin/{name}"), program.clone());
        files.extend(libraries(&lab.qemu.command(), program)?);
    }
    let root = lab.qemu.root().unwrap_or(Path::new("/"));
    for name in FIRMWARE {
        let places = FIRMWARE_PLACES.map(|place| root.join(place).join(name));
        let found = places.into_iter().find(|path| path.is_file());
        files.insert(
            format!("vmm/share/{name}"),
            found.with_context(|| format!("QEMU's packages have no {name}"))?,
        );
    }

    let mut archive = Archive::new();
    for directory in parents(files.keys()) {
        archive.directory(&directory)?;
    }
    for (name, path) in files {
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.executable(&name, &content)?;
    }
    fs::write(to, archive.finish()?).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(GuestFile { name: ARCHIVE.to_owned(), path: to.to_owned() })
}

/// Asks the dynamic linker what it loads for a program, and gives each library with its place in the archive.
fn libraries(qemu: &Command, program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut command = Command::new(program);
    // QEMU's own libraries are found by its own environment.
    command.envs(qemu.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if program.extension() == Some("so".as_ref()) {
        // A library is no program: any program that loads it will do.
        command = Command::new("/bin/true");
        command.env("LD_PRELOAD", program);
    }
    let output = command.env("LD_TRACE_LOADED_OBJECTS", "1").output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let loaded = parse_loaded(&text);
    if loaded.is_empty() || text.contains("not found") {
        bail!("the dynamic linker does not find all that {} needs:\n{text}", program.display());
    }
    Ok(loaded)
}

/// Reads `name => /path (address)` and, for the linker itself, `/path (address)`.
fn parse_loaded(text: &str) -> Vec<(String, PathBuf)> {
    let places = text.lines().filter_map(|line| {
        let line = line.trim().split(" (").next()?;
        match line.split_once(" => ") {
            Some((name, path)) if name.contains('/') && path.starts_with('/') => None,
            Some((name, path)) => {
                path.starts_with('/').then(|| (format!("vmm/lib/{name}"), PathBuf::from(path)))
            }
            // A preloaded library is listed by its path too; only the linker must lie where programs name it.
            None => line
                .contains("/ld-linux")
                .then(|| (line.trim_start_matches('/').to_owned(), PathBuf::from(line))),
        }
    });
    places.collect()
}

/// Every directory above the files, each after its own parent.
fn parents<'a>(files: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let above = files.flat_map(|file| Path::new(file).ancestors().skip(1));
    above.filter_map(|path| path.to_str()).filter(|path| !path.is_empty()).map(str::to_owned).collect()
}

fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("no {program} in PATH"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaded_libraries_are_read_with_their_paths() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x00007f01)\n\
                    \t/t/libpremap_preload.so (0x00007f02)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f03)\n";
        let expected = [
            ("vmm/lib/libm.so.6".to_owned(), PathBuf::from("/lib/x/libm.so.6")),
            ("lib64/ld-linux-x86-64.so.2".to_owned(), PathBuf::from("/lib64/ld-linux-x86-64.so.2")),
        ];
        assert_eq!(parse_loaded(text), expected);
        assert_eq!(parse_loaded("\tlibx.so => not found\n"), []);
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let files = ["a/b/c".to_owned(), "a/d".to_owned()];
        assert_eq!(parents(files.iter()).into_iter().collect::<Vec<_>>(), ["a", "a/b"]);
    }
}
