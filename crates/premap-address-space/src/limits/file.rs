//! Files of the kernel's, read no further than any of them is long, and as bytes: names in them may be anything.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Longer than any of the files read here: `/proc/self/mountinfo` is the longest, with some 200 bytes a mount.
const LONGEST: u64 = 16 << 20;

/// The file system, from its root or another directory on.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
}

impl Files {
    pub(super) fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Reads a file, if there is one that can be read.
    pub(super) fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let path = self.root.join(path.strip_prefix("/").unwrap_or(path));
        let mut bytes = Vec::new();
        File::open(path).ok()?.take(LONGEST).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Reads a file that holds one number.
    pub(super) fn number(&self, path: &Path) -> Option<u64> {
        number(&self.read(path)?)
    }
}

/// The number that a text is; `max`, the word for no limit, is none.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// The number behind a name at the start of a line: `MemTotal:  8 kB`, `inactive_file 4096`.
pub(super) fn field(text: &[u8], name: &str) -> Option<u64> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| {
        line.strip_prefix(name.as_bytes()).filter(|value| value.first().is_some_and(u8::is_ascii_whitespace))
    })?;
    let value = value.trim_ascii();
    match value.strip_suffix(b" kB") {
        Some(kib) => number(kib)?.checked_mul(1024),
        None => number(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_names_with_numbers_in_either_unit() {
        let text = b"VmSize:\t    3840 kB\nMemFree: 1 kB\nMemAvailable:     2048 kB\ninactive_file 4096\n\xff\xfe 7\nbad x\n";
        assert_eq!(field(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(field(text, "inactive_file"), Some(4096));
        assert_eq!(field(text, "VmSize:"), Some(3840 << 10));
        for name in ["inactive", "bad", "none", "MemAvailable"] {
            assert_eq!(field(text, name), None, "{name}");
        }
        assert_eq!(field(b"MemAvailable: 18446744073709551615 kB", "MemAvailable:"), None);
        assert_eq!(field(b"MemAvailable: -1 kB", "MemAvailable:"), None);
        assert_eq!(number(b"max\n"), None);
        assert_eq!(number(b"12\n"), Some(12));
    }

    #[test]
    fn what_cannot_be_read_is_none_and_what_never_ends_is_cut() {
        let files = Files::below(Path::new("/"));
        assert_eq!(files.read(Path::new("/proc/none")), None);
        assert_eq!(files.read(Path::new("/")), None);
        assert_eq!(files.read(Path::new("/dev/zero")).map(|bytes| bytes.len() as u64), Some(LONGEST));
    }
}
