//! Files that the user names: read whole, but no further than such a file can be long, and never waited for.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::OFlags;

use crate::size::Size;

/// A kind of file, and what is longer than any of its kind. What never ends, such as a device, is not read on beyond that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// What is expected, as in `a working set`.
    pub(crate) name: &'static str,
    pub(crate) longest: Size,
}

impl Kind {
    pub(crate) const FIRMWARE: Self = Self { name: "an OVMF image", longest: Size(64 << 20) };
    /// Four million ranges.
    pub(crate) const WORKING_SET: Self =
        Self { name: "a file that `premap record` wrote", longest: Size(64 << 20) };
    pub(crate) const KERNEL: Self = Self { name: "a bzImage", longest: Size(256 << 20) };
    pub(crate) const INITRAMFS: Self = Self { name: "an initramfs", longest: Size(1 << 30) };
}

/// Reads a file of a kind; `name` is how it is named in errors.
pub(crate) fn read(path: &Path, name: &str, kind: Kind) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = open(path).with_context(|| name.to_owned())?;
    let Size(longest) = kind.longest;
    let length =
        file.take(longest.saturating_add(1)).read_to_end(&mut bytes).with_context(|| name.to_owned())?;
    if u64::try_from(length).is_ok_and(|length| length > longest) {
        bail!("{name}: longer than {}, which no such file is; give {}", kind.longest, kind.name);
    }
    Ok(bytes)
}

/// Opens a file without waiting for anybody: a pipe's other end may never come.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(no_wait).open(path)?;
    let kind = file.metadata()?.file_type();
    let what = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe, which may never end",
        () => return Ok(file),
    };
    Err(io::Error::other(format!("{what}; give a regular file")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { name: "a word", longest: Size(8) };

    #[track_caller]
    fn check(path: &Path, expected: &str) {
        let error = read(path, "--word X", KIND).unwrap_err();
        let line = format!("{error:#}");
        assert!(line.starts_with("--word X: ") && line.contains(expected), "{line}");
    }

    #[test]
    fn what_is_too_long_or_never_ends_is_refused_with_its_length() {
        check(Path::new("/dev/zero"), "longer than 8 bytes, which no such file is; give a word");
        check(Path::new("/proc/self/maps"), "longer than 8 bytes");
        assert_eq!(read(Path::new("/dev/null"), "", KIND).unwrap(), b"");
    }

    #[test]
    fn a_directory_a_pipe_and_nothing_are_told_without_waiting() {
        check(&std::env::temp_dir(), "a directory; give a regular file");
        check(Path::new("/nowhere/at/all"), "os error 2");
        let pipe = std::env::temp_dir().join(format!("premap-files-{}", std::process::id()));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        check(&pipe, "a pipe, which may never end; give a regular file");
        std::fs::remove_file(pipe).unwrap();
    }
}
