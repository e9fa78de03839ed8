//! What this process's address space has where: `/proc/self/smaps`, read for what matters to mapping.
//!
//! `smaps` and not `maps`, since only it tells hugetlb's page size, device memory, which must not be touched, and memory
//! whose pages a userfaultfd handler gives. It is read as bytes: a file's path is whatever its owner made it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::file_systems::FileSystems;

/// A stretch of the address space with one kind of memory behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first address.
    pub start: u64,
    /// The address just past it.
    pub end: u64,
    /// What is behind it.
    pub kind: Kind,
    /// Whether this process may read it.
    pub readable: bool,
    /// Whether this process may write it.
    pub writable: bool,
    /// Whether writes reach whoever else maps the same.
    pub shared: bool,
    /// The file behind it, if there is one. A memfd and shared anonymous memory are files too.
    pub file: Option<MappedFile>,
    /// The page size of what is behind it: more than 4 KiB for hugetlb alone.
    pub page_bytes: u64,
}

/// What is behind an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping of memory: a memfd, shared anonymous memory, a file on tmpfs.
    Shared,
    /// A shared mapping of a file that does not live in memory, or that can't be told to: what is written reaches a disk.
    SharedFile,
    /// A private mapping of a file.
    PrivateFile,
    /// Pages of this many bytes.
    Hugetlb(u64),
    /// A device's registers or memory.
    Device,
    /// A userfaultfd handler gives the pages, or is asked before they are written.
    Userfault,
    /// Mapped with no access.
    Closed,
}

/// A file behind an area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedFile {
    /// Where it was when it was mapped, as this process's root has it; for a memfd the kernel's name for it.
    pub path: PathBuf,
    /// The file system's device number: major and minor.
    pub device: (u32, u32),
    /// The file's number in it.
    pub inode: u64,
    /// Where in the file the area begins.
    pub offset: u64,
    /// Whether its file system is known to be memory and nothing else.
    pub in_memory: bool,
}

/// Reads the address space of this process, lowest address first.
///
/// # Errors
/// What opening or reading the file gives.
pub fn areas() -> io::Result<Vec<Area>> {
    let mut areas = parse(BufReader::new(File::open("/proc/self/smaps")?))?;
    let file_systems = FileSystems::read();
    for area in &mut areas {
        let Some(file) = &mut area.file else { continue };
        file.in_memory = file_systems.hold_in_memory(file);
        if area.kind == Kind::SharedFile && file.in_memory {
            area.kind = Kind::Shared;
        }
    }
    Ok(areas)
}

/// Parses the text of `smaps`: a header line for each area, then its fields. Shared mappings of files are all told as
/// such: what their file systems are is not in the text.
fn parse(text: impl BufRead) -> io::Result<Vec<Area>> {
    let mut areas: Vec<Area> = Vec::new();
    for line in text.split(b'\n') {
        let line = line?;
        if let Some(area) = header(&line) {
            areas.push(area);
            continue;
        }
        // Paths are in headers alone.
        let (Ok(line), Some(area)) = (std::str::from_utf8(&line), areas.last_mut()) else { continue };
        if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kib: u64 = size.trim().trim_end_matches("kB").trim().parse().unwrap_or(4);
            area.page_bytes = kib << 10;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            area.kind = refine(area.kind, flags, area.page_bytes);
        }
    }
    Ok(areas)
}

/// `start-end perms offset device inode path`
fn header(line: &[u8]) -> Option<Area> {
    let (range, rest) = word(line)?;
    let (start, end) = std::str::from_utf8(range).ok()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let (&[read, write, _, sharing], rest) = word(rest)? else { return None };
    let (offset, rest) = word(rest)?;
    let (device, rest) = word(rest)?;
    let (inode, path) = word(rest)?;
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let offset = u64::from_str_radix(std::str::from_utf8(offset).ok()?, 16).ok()?;
    let inode: u64 = std::str::from_utf8(inode).ok()?.parse().ok()?;
    let file =
        (inode != 0).then(|| MappedFile { path: path_of(path), device, inode, offset, in_memory: false });
    let shared = sharing == b's';
    let kind = match (read, shared, &file) {
        (b'-', ..) => Kind::Closed,
        (_, true, None) => Kind::Shared,
        (_, true, Some(_)) => Kind::SharedFile,
        (_, false, Some(_)) => Kind::PrivateFile,
        (_, false, None) => Kind::Anonymous,
    };
    let (readable, writable) = (read == b'r', write == b'w');
    Some(Area { start, end, kind, readable, writable, shared, file, page_bytes: 4096 })
}

/// The first word of a line, and what comes after it.
fn word(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    (end > 0).then(|| line.split_at(end))
}

/// A path as the kernel prints it: behind spaces, its newlines escaped, and followed by a note where it was deleted.
fn path_of(text: &[u8]) -> PathBuf {
    let text = text.trim_ascii_start();
    let text = text.strip_suffix(b" (deleted)").unwrap_or(text);
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, others)) = rest.split_first() {
        (rest, _) = match rest.strip_prefix(br"\012") {
            Some(others) => (others, path.push(b'\n')),
            None => (others, path.push(*first)),
        };
    }
    PathBuf::from(OsStr::from_bytes(&path))
}

fn refine(kind: Kind, flags: &str, page: u64) -> Kind {
    let has = |flag: &str| flags.split_ascii_whitespace().any(|one| one == flag);
    match kind {
        Kind::Closed => kind,
        _ if has("io") || has("pf") => Kind::Device,
        // For missing pages, for minor faults, and for writes.
        _ if has("um") || has("ui") || has("uw") => Kind::Userfault,
        _ if has("ht") => Kind::Hugetlb(page),
        _ => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(header: &[u8], page: &str, flags: &str, kind: Kind, writable: bool) -> Area {
        let mut text = header.to_vec();
        let fields =
            format!("\nSize: 4 kB\nKernelPageSize: {page} kB\nMMUPageSize: 4 kB\nVmFlags: {flags}\n");
        text.extend(fields.as_bytes());
        let [area] = &parse(text.as_slice()).unwrap()[..] else { panic!("{header:?} is one area") };
        assert_eq!((area.start, area.end), (0x7f00_0000_0000, 0x7f00_0020_0000), "{header:?}");
        assert_eq!((area.kind, area.writable), (kind, writable), "{header:?}");
        assert_eq!((area.readable, area.shared), (kind != Kind::Closed, header[29] == b's'), "{header:?}");
        assert_eq!(area.page_bytes, page.parse::<u64>().unwrap() << 10, "{header:?}");
        area.clone()
    }

    #[test]
    fn every_kind_of_memory_is_told() {
        check(
            b"7f0000000000-7f0000200000 rw-p 00000000 00:00 0 ",
            "4",
            "rd wr mr mw me ac sd",
            Kind::Anonymous,
            true,
        );
        check(
            b"7f0000000000-7f0000200000 rw-s 00000000 00:01 7 /memfd:x (deleted)",
            "4",
            "rd wr sh",
            Kind::SharedFile,
            true,
        );
        check(
            b"7f0000000000-7f0000200000 r--p 00000000 fe:00 9 /a b",
            "4",
            "rd mr",
            Kind::PrivateFile,
            false,
        );
        check(
            b"7f0000000000-7f0000200000 rw-p 00000000 00:10 3 /anon_hugepage (deleted)",
            "2048",
            "rd wr de ht",
            Kind::Hugetlb(2 << 20),
            true,
        );
        check(
            b"7f0000000000-7f0000200000 rw-s 00000000 00:0f 5 anon_inode:[vfio-device]",
            "4",
            "rd wr io pf",
            Kind::Device,
            true,
        );
        for flag in ["um", "ui", "uw"] {
            let flags = format!("rd wr {flag} ac");
            check(b"7f0000000000-7f0000200000 rw-p 00000000 00:00 0", "4", &flags, Kind::Userfault, true);
        }
        check(b"7f0000000000-7f0000200000 ---p 00000000 00:00 0", "4", "mr mw", Kind::Closed, false);
    }

    #[test]
    fn a_path_is_bytes_with_its_newlines_escaped() {
        let path = |text: &[u8]| {
            let header =
                [b"7f0000000000-7f0000200000 rw-s 0001f000 fe:1a 9                      ", text].concat();
            let area = check(&header, "4", "rd wr", Kind::SharedFile, true);
            let file = area.file.unwrap();
            assert_eq!((file.device, file.inode, file.offset), ((0xfe, 0x1a), 9, 0x1f000));
            file.path
        };
        assert_eq!(path(b"/a b/c"), PathBuf::from("/a b/c"));
        assert_eq!(path(b"/a/\xff\xfe"), PathBuf::from(OsStr::from_bytes(b"/a/\xff\xfe")));
        assert_eq!(path(br"/a\012b (deleted)"), PathBuf::from("/a\nb"));
    }

    #[test]
    fn this_process_is_read_in_order_and_without_overlap() {
        let areas = areas().unwrap();
        let here = std::ptr::from_ref(&areas).addr() as u64;
        let own = areas.iter().find(|area| (area.start..area.end).contains(&here)).unwrap();
        assert_eq!((own.kind, own.writable), (Kind::Anonymous, true));
        assert!(areas.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
