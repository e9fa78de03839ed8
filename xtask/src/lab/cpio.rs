//! A writer of cpio archives in the `newc` format, the one that the kernel unpacks as its initramfs.
//!
//! An entry is a header of 110 ASCII characters, the name with a NUL, and the content; name and content are each
//! padded to four bytes. The archive ends with an entry called `TRAILER!!!`.

use anyhow::{Context, Result};

/// An archive being written, in memory.
pub(super) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

impl Archive {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0 }
    }

    /// Adds a directory. Parents come first: the kernel makes none by itself.
    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    pub(super) fn executable(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.entry(name, EXECUTABLE, content)
    }

    pub(super) fn symlink(&mut self, name: &str, target: &str) -> Result<()> {
        self.entry(name, SYMLINK, target.as_bytes())
    }

    /// Ends the archive and returns its bytes.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len())
            .with_context(|| format!("{name} is too big for an initramfs (4 GiB)"))?;
        let name_size = u32::try_from(name.len() + 1).context("a file name is too long for an initramfs")?;
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_padded_entries_and_a_trailer() {
        let mut archive = Archive::new();
        archive.directory("d").unwrap();
        archive.executable("d/a", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text.len() % 4, 0);
        // The second entry starts after a header of 110, "d\0" and no content.
        let second = &text[112..];
        assert!(second.starts_with("070701"));
        assert_eq!(&second[14..22], "000081ed", "the mode");
        assert_eq!(&second[54..62], "00000005", "the size");
        assert_eq!(&second[94..102], "00000004", "the name's size");
        assert_eq!(&second[110..116], "d/a\0\0\0", "the name, padded from 114 to 116");
        assert_eq!(&second[116..124], "hello\0\0\0");
        assert!(second[124..].contains("TRAILER!!!\0"));
    }
}
