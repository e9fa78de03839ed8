//! The program to run: found as a shell finds it, and looked at for whether a library can be preloaded into it.
//!
//! A program takes a preloaded library if it names a dynamic linker, and one of the same kind as the library's: glibc's,
//! of the same machine. Programs that gain privileges take none. A script is run by another program, which is the one
//! that counts; it is let through.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::process::{getgid, getuid};

use crate::failure::BadUse;
use crate::files;

/// What a program's file tells of its linking.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Linking {
    /// By the dynamic linker of this path.
    Dynamic(String),
    Static,
    /// For another machine, or 32 bits.
    Foreign,
    /// No program of the kernel's own format.
    Other,
}

/// Finds a program by name, in `PATH` unless the name has a slash.
///
/// # Errors
/// Where there is none.
pub(super) fn find(name: &OsStr) -> anyhow::Result<PathBuf> {
    let as_path = Path::new(name);
    if name.as_encoded_bytes().contains(&b'/') {
        fs::metadata(as_path).with_context(|| as_path.display().to_string())?;
        return Ok(as_path.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_program =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|data| data.is_file() && data.mode() & 0o111 != 0);
    let found = std::env::split_paths(&path).map(|directory| directory.join(name)).find(is_program);
    found.ok_or_else(|| BadUse(format!("{}: no such program in PATH", as_path.display())).into())
}

/// Refuses a program that would run without the library.
///
/// # Errors
/// The reason, with the way out.
pub(super) fn check(program: &Path) -> anyhow::Result<()> {
    let name = program.display();
    let mut file = files::open(program).with_context(|| name.to_string())?;
    let linking = linking(&mut file).with_context(|| name.to_string())?;
    let refused = match linking {
        Linking::Static => Some(
            "is linked statically, so nothing can be preloaded into it; link the premap crate into it, or build it \
             dynamically"
                .to_owned(),
        ),
        Linking::Foreign => Some(format!(
            "is not a 64-bit program for {}, as the preloaded library is",
            std::env::consts::ARCH
        )),
        Linking::Dynamic(linker) if linker.contains("ld-musl") => Some(format!(
            "uses another C library ({linker}) than the preloaded one; build it for glibc, or link the premap crate into it"
        )),
        Linking::Dynamic(_) | Linking::Other => gained(program, &file)?,
    };
    match refused {
        Some(why) => Err(BadUse(format!("{name} {why}")).into()),
        None => Ok(()),
    }
}

/// Why the dynamic linker would ignore what is preloaded: the program gains privileges.
fn gained(program: &Path, file: &File) -> anyhow::Result<Option<String>> {
    let data = file.metadata().with_context(|| program.display().to_string())?;
    let setuid = data.mode() & 0o4000 != 0 && data.uid() != getuid().as_raw();
    let setgid = data.mode() & 0o2000 != 0 && data.gid() != getgid().as_raw();
    let mut none = [0_u8; 0];
    let capable =
        !getuid().is_root() && rustix::fs::fgetxattr(file, c"security.capability", &mut none).is_ok();
    let how = match (setuid, setgid, capable) {
        (true, ..) => "is setuid",
        (_, true, _) => "is setgid",
        (.., true) => "has file capabilities",
        _ => return Ok(None),
    };
    Ok(Some(format!(
        "{how}, so the dynamic linker ignores what is preloaded; run it as the user whose rights it takes"
    )))
}

/// Reads how a program is linked.
fn linking(file: &mut (impl Read + Seek)) -> std::io::Result<Linking> {
    const PT_INTERP: u64 = 3;
    const ET_EXEC: u64 = 2;
    const ET_DYN: u64 = 3;
    // Little-endian, as every 64-bit machine is that KVM is at home on here.
    const HEADER: &[u8] = b"\x7fELF\x02\x01";
    let machine = match std::env::consts::ARCH {
        "x86_64" => 62,
        "aarch64" => 183,
        "riscv64" => 243,
        _ => return Ok(Linking::Other),
    };
    let header = bytes(file, 0, 64)?;
    if !header.starts_with(b"\x7fELF") {
        return Ok(Linking::Other);
    }
    if !header.starts_with(HEADER) || header.len() < 64 || field(&header, 18, 2) != machine {
        return Ok(Linking::Foreign);
    }
    if ![ET_EXEC, ET_DYN].contains(&field(&header, 16, 2)) {
        return Ok(Linking::Other);
    }
    let (first, size, count) = (field(&header, 32, 8), field(&header, 54, 2), field(&header, 56, 2));
    for number in 0..count {
        let entry = bytes(file, first.saturating_add(number * size), 56)?;
        if entry.len() == 56 && field(&entry, 0, 4) == PT_INTERP {
            // A path is short; what claims to be longer is cut.
            let path = bytes(file, field(&entry, 8, 8), field(&entry, 32, 8).min(4096))?;
            let path = path.split(|byte| *byte == 0).next().unwrap_or_default();
            return Ok(Linking::Dynamic(String::from_utf8_lossy(path).into_owned()));
        }
    }
    Ok(Linking::Static)
}

/// Reads so many bytes from there, or fewer where the file ends.
fn bytes(file: &mut (impl Read + Seek), offset: u64, count: u64) -> std::io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn field(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A program with one header of the given kind, and a dynamic linker's path behind it.
    fn program(class: u8, kind: u8) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        bytes[16] = 3;
        bytes[18] = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
        (bytes[32], bytes[54], bytes[56]) = (64, 56, 1);
        bytes[64] = kind;
        bytes[64 + 8] = 120;
        bytes[64 + 32] = 8;
        bytes.extend_from_slice(b"/ld.so\0\0");
        bytes
    }

    #[track_caller]
    fn check_linking(file: &[u8], expected: Linking) {
        assert_eq!(linking(&mut Cursor::new(file)).unwrap(), expected);
    }

    #[test]
    fn how_a_program_is_linked_is_read_from_its_file() {
        check_linking(&program(2, 3), Linking::Dynamic("/ld.so".to_owned()));
        check_linking(&program(2, 1), Linking::Static);
        check_linking(&program(1, 3), Linking::Foreign);
        check_linking(b"#!/bin/sh\n", Linking::Other);
        check_linking(b"", Linking::Other);
    }

    #[test]
    fn a_file_that_ends_early_or_points_nowhere_is_no_panic() {
        let whole = program(2, 3);
        for length in 0..whole.len() {
            let cut = linking(&mut Cursor::new(&whole[..length])).unwrap();
            assert!(length >= 120 || !matches!(cut, Linking::Dynamic(_)), "{length}: {cut:?}");
        }
        let mut astray = whole;
        astray[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        check_linking(&astray, Linking::Static);
    }

    #[test]
    fn this_test_s_own_program_is_dynamic_unless_it_was_built_otherwise() {
        let own = std::env::current_exe().unwrap();
        let linking = linking(&mut File::open(own).unwrap()).unwrap();
        assert_eq!(
            matches!(linking, Linking::Dynamic(_)),
            !cfg!(target_feature = "crt-static"),
            "{linking:?}"
        );
    }
}
