//! Noticing that a thread is confined by seccomp, without a call that its filter might not allow.
//!
//! Two moments matter. When the library starts, the thread at hand has just opened `/dev/kvm`, so its filter, if it has
//! one, allows to open and read a file. Before each piece of work the library's own thread looks at itself: filters may
//! have been laid on all threads meanwhile (`SECCOMP_FILTER_FLAG_TSYNC`). Opening a file could be fatal by then, so the
//! file is opened ahead, while it is safe, and at the time only read; `/proc` fills it in at the read. It stays open, so
//! that a process which leaves its `/proc` behind (`chroot`) can be looked at still.

use std::fs::File;
use std::io::{Read, Seek};

use premap::seccomp::{Mode, rules};

/// What a user must allow in a filter, to be told with the refusal.
pub(crate) fn needed() -> String {
    premap::seccomp::list(&rules(&[Mode::ExecStart, Mode::Exec]))
}

/// Looks at the thread that makes it.
pub(crate) struct Look {
    /// Opened and not read yet.
    status: Option<File>,
}

impl Look {
    /// Gets ready to look. To be made on the thread to be looked at, while opening a file is allowed.
    pub(crate) fn new() -> Self {
        Self { status: File::open("/proc/thread-self/status").ok() }
    }

    /// Whether the calling thread, which made this, is confined now. `None` where that can't be told.
    pub(crate) fn is_confined(&mut self) -> Option<bool> {
        // One read gives it all: the file is a page or so.
        let mut text = [0; 4096];
        let mut status = self.status.take()?;
        let count = status.read(&mut text).ok()?;
        let confined = mode(&String::from_utf8_lossy(&text[..count]))? != 0;
        if !confined && status.rewind().is_ok() {
            self.status = Some(status);
        }
        Some(confined)
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
            assert_eq!(look.is_confined(), Some(own_mode() != 0));
        }
    }

    fn own_mode() -> u32 {
        mode(&std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap()
    }
}
