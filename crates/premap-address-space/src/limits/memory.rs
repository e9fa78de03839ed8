//! How far memory cgroups are from their limits.

use super::cgroup::{Group, Groups, Version};
use super::file::{Files, field};
use super::{Limit, LimitKind};

/// No machine has as much: version 1 writes the largest number of pages for no limit.
pub(super) const UNLIMITED: u64 = 1 << 62;

/// The limits of the process's memory cgroups.
pub(super) fn limits(files: &Files, groups: &Groups) -> Vec<Limit> {
    let mut limits = Vec::new();
    let mut outermost = None;
    for (depth, group) in groups.iter().enumerate() {
        match group.version {
            Version::Two => limits.extend(second_version(files, group)),
            // Such a group counts only what is in it, and not what is in those below.
            Version::One if depth > 0 && number(files, group, "memory.use_hierarchy") == Some(0) => {}
            Version::One => {
                limits.extend(first_version(files, group));
                outermost = Some(group);
            }
        }
    }
    // What is mounted may not show the groups that a container is in, but their limit is told in its own.
    let own = groups.iter().find(|group| group.version == Version::One);
    if let (Some(own), Some(outermost)) = (own, outermost) {
        limits.extend(hidden(files, own, outermost, &limits));
    }
    limits
}

fn number(files: &Files, group: &Group, name: &str) -> Option<u64> {
    files.number(&group.path.join(name))
}

fn limit(group: &Group, file: &str, bytes: u64, used: u64) -> Limit {
    let path = Some(group.path.join(file));
    Limit { kind: LimitKind::Cgroup, path, bytes, left: bytes.saturating_sub(used) }
}

/// What the kernel takes back before it kills: file pages that nobody used lately, and about half of the others and of
/// its own caches, as in its estimate of what the host has available.
fn reclaimable(stat: &[u8], prefix: &str) -> u64 {
    let field = |name: &str| field(stat, &format!("{prefix}{name}")).unwrap_or(0);
    let half = field("active_file").saturating_add(field("slab_reclaimable")) / 2;
    field("inactive_file").saturating_add(half)
}

fn second_version(files: &Files, group: &Group) -> Option<Limit> {
    let number = |name| number(files, group, name);
    // Beyond `high` nothing is killed, but everything is slowed down to a crawl.
    let both = ["memory.max", "memory.high"].into_iter();
    let (bytes, file) = both.filter_map(|file| Some((number(file)?, file))).min()?;
    let stat = files.read(&group.path.join("memory.stat")).unwrap_or_default();
    let used = number("memory.current")?.saturating_sub(reclaimable(&stat, ""));
    Some(limit(group, file, bytes, used))
}

fn first_version(files: &Files, group: &Group) -> Option<Limit> {
    let number = |name: &str| number(files, group, name);
    let stat = files.read(&group.path.join("memory.stat")).unwrap_or_default();
    let reclaimable = reclaimable(&stat, "total_");
    // The second counts swap too.
    let both = ["memory", "memory.memsw"].into_iter().filter_map(|name| {
        let file = format!("{name}.limit_in_bytes");
        let bytes = number(&file).filter(|bytes| *bytes < UNLIMITED)?;
        let used = number(&format!("{name}.usage_in_bytes"))?;
        Some(limit(group, &file, bytes, used.saturating_sub(reclaimable)))
    });
    both.min_by_key(|limit| limit.left)
}

/// The limit of a group above those that can be read. How much is used there is unknown: at least as much as below.
fn hidden(files: &Files, own: &Group, outermost: &Group, seen: &[Limit]) -> Option<Limit> {
    let stat = files.read(&own.path.join("memory.stat"))?;
    let bytes = field(&stat, "hierarchical_memory_limit").filter(|bytes| *bytes < UNLIMITED)?;
    if seen.iter().any(|limit| limit.bytes <= bytes) {
        return None;
    }
    let outer = files.read(&outermost.path.join("memory.stat")).unwrap_or_default();
    let used = number(files, outermost, "memory.usage_in_bytes")?;
    Some(limit(outermost, "memory.stat", bytes, used.saturating_sub(reclaimable(&outer, "total_"))))
}
