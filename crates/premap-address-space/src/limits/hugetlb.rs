//! How many hugetlb pages can still be had: of the host's pool, and of what cgroups allow.
//!
//! A mapping reserves its pages when it is made, so that pages which others reserved are not to be had for a new one. For
//! one that is made, its own are among them.

use std::path::Path;

use super::cgroup::{Group, Groups, Version};
use super::file::Files;
use super::{Limit, LimitKind, Mapping};

/// What the host's pool of such pages has left.
pub(super) fn pool(files: &Files, page: u64, mapping: Mapping) -> Option<Limit> {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
    let path = Path::new(&path);
    let number = |name| files.number(&path.join(name));
    let all = number("nr_hugepages")?;
    // More are made at need where that is allowed.
    let more = number("nr_overcommit_hugepages").unwrap_or(0);
    let more = more.saturating_sub(number("surplus_hugepages").unwrap_or(0));
    let reserved = match mapping {
        Mapping::Made => 0,
        Mapping::Planned => number("resv_hugepages").unwrap_or(0),
    };
    let left = number("free_hugepages")?.saturating_add(more).saturating_sub(reserved);
    let bytes = |pages: u64| pages.saturating_mul(page);
    Some(Limit {
        kind: LimitKind::HugetlbPool,
        path: Some(path.to_owned()),
        bytes: bytes(all.saturating_add(more)),
        left: bytes(left),
    })
}

/// What cgroups allow.
pub(super) fn limits(files: &Files, groups: &Groups, page: u64, mapping: Mapping) -> Vec<Limit> {
    let size = size_name(page);
    let names: &[&str] = match mapping {
        Mapping::Made => &[""],
        Mapping::Planned => &["", ".rsvd"],
    };
    let limits = groups.iter().flat_map(|group| names.iter().map(move |name| (group, name)));
    limits.filter_map(|(group, name)| limit(files, group, &format!("hugetlb.{size}{name}"), page)).collect()
}

fn limit(files: &Files, group: &Group, name: &str, page: u64) -> Option<Limit> {
    let (most, used) = match group.version {
        Version::One => ("limit_in_bytes", "usage_in_bytes"),
        Version::Two => ("max", "current"),
    };
    let path = |what| group.path.join(format!("{name}.{what}"));
    let number = |what| files.number(&path(what));
    // Version 1 writes the largest number of pages for no limit.
    let bytes = number(most).filter(|bytes| *bytes < super::memory::UNLIMITED)?;
    let left = bytes.saturating_sub(number(used)?) / page.max(1) * page;
    Some(Limit { kind: LimitKind::HugetlbCgroup, path: Some(path(most)), bytes, left })
}

/// The name of a page size in the files' names: 64KB, 2MB, 1GB.
fn size_name(page: u64) -> String {
    match page.max(1).ilog2() {
        30.. => format!("{}GB", page >> 30),
        20.. => format!("{}MB", page >> 20),
        _ => format!("{}KB", page >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_named_as_the_kernel_does() {
        let names = [64 << 10, 2 << 20, 1 << 30, 16 << 30].map(size_name);
        assert_eq!(names, ["64KB", "2MB", "1GB", "16GB"]);
    }
}
