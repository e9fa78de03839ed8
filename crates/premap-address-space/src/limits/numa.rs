//! What is left on the NUMA nodes that a cpuset confines the process to: the host may have more, but not for it.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::file::{Files, field};
use super::{Limit, LimitKind};

const NODES: &str = "/sys/devices/system/node";

/// What the nodes that the process may use have left, where it may not use all that have memory.
pub(super) fn available(files: &Files) -> Option<Limit> {
    let with_memory = files.read(&Path::new(NODES).join("has_memory"))?;
    let status = files.read(Path::new("/proc/self/status"))?;
    let mut lines = status.split(|byte| *byte == b'\n');
    let allowed = list(lines.find_map(|line| line.strip_prefix(b"Mems_allowed_list:"))?)?;
    let is_allowed = |node: &u32| allowed.iter().any(|nodes| nodes.contains(node));
    let (usable, others): (Vec<u32>, Vec<u32>) =
        list(&with_memory)?.into_iter().flatten().partition(is_allowed);
    if others.is_empty() {
        return None;
    }
    let (mut bytes, mut left) = (0_u64, 0_u64);
    for node in usable {
        let text = files.read(&Path::new(NODES).join(format!("node{node}/meminfo")))?;
        let field = |name| field(&text, &format!("Node {node} {name}:"));
        bytes = bytes.saturating_add(field("MemTotal")?);
        // As the kernel estimates what the whole host has available.
        let of = |name| field(name).unwrap_or(0);
        let half = of("Active(file)").saturating_add(of("KReclaimable")) / 2;
        left =
            left.saturating_add(field("MemFree")?).saturating_add(of("Inactive(file)")).saturating_add(half);
    }
    Some(Limit { kind: LimitKind::Available, path: Some(PathBuf::from(NODES)), bytes, left })
}

/// Reads a list such as `0-1,3`.
fn list(text: &[u8]) -> Option<Vec<RangeInclusive<u32>>> {
    let parts = std::str::from_utf8(text).ok()?.trim().split(',').filter(|part| !part.is_empty());
    let numbers = parts.map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        // Linux has no more than 1024 nodes.
        Some(first.parse().ok()?..=last.parse().ok().filter(|last: &u32| *last < 1024)?)
    });
    numbers.collect()
}
