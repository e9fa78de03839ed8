//! What the host has left, and what the process may still map.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::file::{Files, field};
use super::{Limit, LimitKind};

/// What the host can still give, by its own estimate. Swap does not count: what is written out to make room comes back
/// one fault after the other.
pub(super) fn available(files: &Files) -> Option<Limit> {
    let text = files.read(Path::new("/proc/meminfo"))?;
    let left = field(&text, "MemAvailable:")?;
    let bytes = field(&text, "MemTotal:").unwrap_or(left);
    Some(Limit { kind: LimitKind::Available, path: None, bytes, left })
}

/// What RLIMIT_AS leaves.
pub(super) fn address_space(files: &Files) -> Option<Limit> {
    let bytes = getrlimit(Resource::As).current?;
    let taken = field(&files.read(Path::new("/proc/self/status"))?, "VmSize:")?;
    Some(Limit { kind: LimitKind::AddressSpace, path: None, bytes, left: bytes.saturating_sub(taken) })
}
