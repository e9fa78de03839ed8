//! Which descriptors are a VM's or a vCPU's, by number and without a lock: `close` asks at every call.
//!
//! Numbers beyond the table count as not watched: the library then does less, and nothing wrong.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

const COUNT: usize = 4096;

static WATCHED: [AtomicBool; COUNT] = [const { AtomicBool::new(false) }; COUNT];

fn entry(fd: RawFd) -> Option<&'static AtomicBool> {
    WATCHED.get(usize::try_from(fd).ok()?)
}

/// Begins to watch a descriptor.
pub(crate) fn watch(fd: RawFd) {
    if let Some(entry) = entry(fd) {
        entry.store(true, Ordering::Relaxed);
    }
}

/// Forgets a descriptor that is about to be closed.
pub(crate) fn forget(fd: RawFd) {
    if let Some(entry) = entry(fd) {
        entry.store(false, Ordering::Relaxed);
    }
}

/// Whether a descriptor is a VM's or a vCPU's.
pub(crate) fn is_watched(fd: RawFd) -> bool {
    entry(fd).is_some_and(|entry| entry.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_watched_until_it_is_forgotten() {
        let fd = 4_000;
        assert!(!is_watched(fd));
        watch(fd);
        assert!(is_watched(fd) && !is_watched(fd + 1));
        forget(fd);
        assert!(!is_watched(fd));
    }

    #[test]
    fn numbers_beyond_the_table_are_not_watched() {
        for fd in [-1, 4_096, i32::MAX] {
            watch(fd);
            forget(fd);
            watch(fd);
            assert!(!is_watched(fd), "{fd}");
        }
    }
}
