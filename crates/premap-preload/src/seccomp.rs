//! Noticing that a thread is confined by seccomp, without a call that its filter might not allow.
//!
//! Two moments matter. When the library starts, the thread at hand has just opened `/dev/kvm`, so its filter, if it has
//! one, allows to open and read a file. Before each piece of work the library's own thread looks at itself: filters may
//! have been laid on all threads meanwhile (`SECCOMP_FILTER_FLAG_TSYNC`). Opening a file could be fatal by then, so the
//! file is opened ahead, while it is safe, and at the time only read; `/proc` fills it in at the read.

use std::fs::File;
use std::io::{self, Read};

use premap::seccomp::{Mode, list, rules};

const STATUS: &str = "/proc/thread-self/status";

/// Looks at the thread that makes it.
pub(crate) struct Look {
    /// Opened and not read yet.
    status: io::Result<File>,
}

impl Look {
    /// Gets ready to look. To be made on the thread to be looked at, while opening a file is allowed.
    pub(crate) fn new() -> Self {
        Self { status: File::open(STATUS) }
    }

    /// Why nothing may be risked on the calling thread, which made this: it is confined, or that can't be told.
    pub(crate) fn objection(&mut self) -> Option<String> {
        match self.is_confined() {
            Ok(false) => None,
            Ok(true) => Some(format!(
                "this process is confined by seccomp, and its filter might kill it for what mapping takes. If the filter \
                 allows {}, say --seccomp trust",
                list(&rules(&[Mode::ExecStart, Mode::Exec]))
            )),
            Err(error) => Some(format!(
                "{STATUS}: {error}; where that can't be read, neither can a filter be noticed, nor the address space be \
                 known: mount proc on /proc, where the VMM is in a chroot inside that"
            )),
        }
    }

    /// Whether the calling thread is confined now.
    ///
    /// # Errors
    /// What opening or reading the file gave.
    fn is_confined(&mut self) -> io::Result<bool> {
        let unread = || io::Error::from(io::ErrorKind::InvalidData);
        let mut file = std::mem::replace(&mut self.status, Err(unread()))?;
        // One read gives it all: the file is a page or so.
        let mut text = [0; 4096];
        let count = file.read(&mut text)?;
        let confined = mode(&String::from_utf8_lossy(&text[..count])).ok_or_else(unread)? != 0;
        if !confined {
            *self = Self::new();
        }
        Ok(confined)
    }
}

/// Reads the mode from the text of a status file: 0 free, 1 strict, 2 filtered.
fn mode(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Seccomp:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_read_from_the_status() {
        let check = |text: &str, expected| assert_eq!(mode(text), expected, "{text}");
        check("Name:\tqemu\nSeccomp:\t2\nSeccomp_filters:\t1\n", Some(2));
        check("NoNewPrivs:\t0\nSeccomp:\t0\n", Some(0));
        check("Seccomp_filters:\t1\n", None);
        check("", None);
    }

    #[test]
    fn a_free_thread_can_be_looked_at_again_and_again() {
        let mut look = Look::new();
        for _ in 0..3 {
            assert_eq!(look.is_confined().unwrap(), own_mode() != 0);
            assert_eq!(look.objection().is_some(), own_mode() != 0);
        }
    }

    fn own_mode() -> u32 {
        mode(&std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap()
    }
}
