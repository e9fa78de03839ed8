//! What this process's address space has where: `/proc/self/smaps`, read for what matters to mapping.
//!
//! `smaps` and not `maps`, since only it tells hugetlb's page size, and device memory, which must not be touched.

use std::io::{self, BufRead, BufReader};

/// A stretch of the address space with one kind of memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Whether a file is behind it. A memfd and shared anonymous memory are files too.
    pub file: bool,
    /// The page size of what is behind it: more than 4 KiB for hugetlb alone.
    pub page_bytes: u64,
}

/// What is behind an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping.
    Shared,
    /// A private mapping of a file.
    PrivateFile,
    /// Pages of this many bytes.
    Hugetlb(u64),
    /// A device's registers or memory.
    Device,
    /// A userfaultfd handler gives the pages, in an order of its own.
    Userfault,
    /// Mapped with no access.
    Closed,
}

/// Reads the address space of this process, lowest address first.
///
/// # Errors
/// What opening or reading the file gives.
pub fn areas() -> io::Result<Vec<Area>> {
    parse(BufReader::new(std::fs::File::open("/proc/self/smaps")?))
}

/// Parses the text of `smaps`: a header line for each area, then its fields.
fn parse(text: impl BufRead) -> io::Result<Vec<Area>> {
    let mut areas: Vec<Area> = Vec::new();
    for line in text.lines() {
        let line = line?;
        if let Some(area) = header(&line) {
            areas.push(area);
        } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kib: u64 = size.trim().trim_end_matches("kB").trim().parse().unwrap_or(4);
            if let Some(area) = areas.last_mut() {
                area.page_bytes = kib << 10;
            }
        } else if let (Some(flags), Some(area)) = (line.strip_prefix("VmFlags:"), areas.last_mut()) {
            area.kind = refine(area.kind, flags, area.page_bytes);
        }
    }
    Ok(areas)
}

/// `start-end perms offset device inode path`
fn header(line: &str) -> Option<Area> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let [read, write, _, sharing] = words.next()?.as_bytes() else { return None };
    let inode: u64 = words.nth(2)?.parse().ok()?;
    let kind = match (read, sharing) {
        (b'-', _) => Kind::Closed,
        (_, b's') => Kind::Shared,
        _ if inode != 0 => Kind::PrivateFile,
        _ => Kind::Anonymous,
    };
    let (readable, writable, shared) = (*read == b'r', *write == b'w', *sharing == b's');
    Some(Area { start, end, kind, readable, writable, shared, file: inode != 0, page_bytes: 4096 })
}

fn refine(kind: Kind, flags: &str, page: u64) -> Kind {
    let has = |flag: &str| flags.split_ascii_whitespace().any(|one| one == flag);
    match kind {
        Kind::Closed => kind,
        _ if has("io") || has("pf") => Kind::Device,
        _ if has("um") || has("ui") => Kind::Userfault,
        _ if has("ht") => Kind::Hugetlb(page),
        _ => kind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(header: &str, page: &str, flags: &str, kind: Kind, writable: bool) {
        let text =
            format!("{header}\nSize: 4 kB\nKernelPageSize: {page} kB\nMMUPageSize: 4 kB\nVmFlags: {flags}\n");
        let [area] = parse(text.as_bytes()).unwrap()[..] else { panic!("{header} is one area") };
        assert_eq!((area.start, area.end), (0x7f00_0000_0000, 0x7f00_0020_0000), "{header}");
        assert_eq!((area.kind, area.writable), (kind, writable), "{header}");
        let shared = header.split(' ').nth(1).unwrap().ends_with('s');
        assert_eq!((area.readable, area.shared), (kind != Kind::Closed, shared), "{header}");
        assert_eq!(area.page_bytes, page.parse::<u64>().unwrap() << 10, "{header}");
    }

    #[test]
    fn every_kind_of_memory_is_told() {
        const AT: &str = "7f0000000000-7f0000200000";
        check(&format!("{AT} rw-p 00000000 00:00 0 "), "4", "rd wr mr mw me ac sd", Kind::Anonymous, true);
        check(&format!("{AT} rw-s 00000000 00:01 7 /memfd:x (deleted)"), "4", "rd wr sh", Kind::Shared, true);
        check(&format!("{AT} r--p 00000000 fe:00 9 /a b"), "4", "rd mr", Kind::PrivateFile, false);
        check(
            &format!("{AT} rw-p 00000000 00:10 3 /anon_hugepage (deleted)"),
            "2048",
            "rd wr de ht",
            Kind::Hugetlb(2 << 20),
            true,
        );
        check(
            &format!("{AT} rw-s 00000000 00:0f 5 anon_inode:[vfio-device]"),
            "4",
            "rd wr io pf",
            Kind::Device,
            true,
        );
        check(&format!("{AT} rw-p 00000000 00:00 0"), "4", "rd wr um ac", Kind::Userfault, true);
        check(&format!("{AT} ---p 00000000 00:00 0"), "4", "mr mw", Kind::Closed, false);
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
