//! Which descriptors are a VM's or a vCPU's, by number and without a lock: `close` and its kin ask at every call.
//!
//! Numbers beyond the table count as not watched: the library then does less, and nothing wrong.

use std::ops::RangeInclusive;
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

/// Forgets a descriptor that is closed.
pub(crate) fn forget(fd: RawFd) {
    if let Some(entry) = entry(fd) {
        entry.store(false, Ordering::Relaxed);
    }
}

/// Whether a descriptor is a VM's or a vCPU's.
pub(crate) fn is_watched(fd: RawFd) -> bool {
    entry(fd).is_some_and(|entry| entry.load(Ordering::Relaxed))
}

/// The watched ones of a range, in ascending order.
pub(crate) fn watched(range: RangeInclusive<RawFd>) -> impl Iterator<Item = RawFd> {
    let last = (*range.end()).min(RawFd::try_from(COUNT).unwrap_or(RawFd::MAX));
    (*range.start()..=last).filter(|fd| is_watched(*fd))
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

    #[test]
    fn the_watched_ones_of_a_range_are_found() {
        [4_010, 4_012].into_iter().for_each(watch);
        assert_eq!(watched(4_009..=i32::MAX).collect::<Vec<_>>(), [4_010, 4_012]);
        assert_eq!(watched(4_011..=4_011).next(), None);
        [4_010, 4_012].into_iter().for_each(forget);
    }
}
