//! Huge pages on the host: transparent ones and those of hugetlb.

use std::fs;

use super::check::{Check, Status};
use crate::size::Size;

pub(super) fn transparent_huge_pages() -> Check {
    let read =
        |file| fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}")).unwrap_or_default();
    judge_thp(&read("enabled"), &read("defrag"))
}

/// Judges the texts of `enabled` and `defrag`, in which brackets mark the choice: `always [madvise] never`.
fn judge_thp(enabled: &str, defrag: &str) -> Check {
    let name = "transparent huge pages";
    let Some(enabled) = chosen(enabled) else {
        return Check::new(name, Status::Limited, "not in this kernel").advise(
            "hugetlb pages also save most of the faults; or run a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        );
    };
    let result = format!("{enabled}, defrag {}", chosen(defrag).unwrap_or("unknown"));
    match enabled {
        "never" => Check::new(name, Status::Limited, result).advise(
            "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, so that --backing thp gets huge pages",
        ),
        _ => Check::good(name, result),
    }
}

fn chosen(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

pub(super) fn hugetlb() -> Check {
    let mut pools = Vec::new();
    for entry in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let read = |file| fs::read_to_string(entry.path().join(file)).ok()?.trim().parse::<u64>().ok();
        let size = pool_size(&entry.file_name().to_string_lossy());
        if let (Some(size), Some(free), Some(all)) = (size, read("free_hugepages"), read("nr_hugepages")) {
            pools.push(Pool { size, free, all });
        }
    }
    judge_hugetlb(pools)
}

/// hugetlb pages of one size.
struct Pool {
    size: Size,
    free: u64,
    all: u64,
}

/// Reads the size in a pool's name, `hugepages-2048kB`.
fn pool_size(name: &str) -> Option<Size> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    kib.checked_mul(1024).map(Size)
}

fn judge_hugetlb(mut pools: Vec<Pool>) -> Check {
    let name = "hugetlb pages";
    if pools.is_empty() {
        return Check::new(name, Status::Limited, "not in this kernel")
            .advise("only needed for --backing hugetlb: a kernel with CONFIG_HUGETLBFS");
    }
    pools.sort_by_key(|pool| pool.size);
    let result: Vec<_> =
        pools.iter().map(|Pool { size, free, all }| format!("{size}: {free} of {all} free")).collect();
    let check = Check::good(name, result.join("; "));
    if pools.iter().any(|pool| pool.free > 0) {
        check
    } else {
        Check { status: Status::Limited, ..check }
            .advise("only needed for --backing hugetlb: `sysctl vm.nr_hugepages=256` for 512 MiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bracketed_choice_is_the_one_in_force() {
        let always = judge_thp("[always] madvise never\n", "always defer [defer+madvise] madvise never\n");
        assert_eq!((always.status, always.result.as_str()), (Status::Good, "always, defrag defer+madvise"));
        assert_eq!(judge_thp("always [madvise] never", "[always]").status, Status::Good);
        let never = judge_thp("always madvise [never]", "");
        assert_eq!(never.status, Status::Limited);
        assert!(never.advice.unwrap().contains("echo madvise"));
        assert_eq!(judge_thp("", "").result, "not in this kernel");
    }

    #[test]
    fn pools_are_listed_smallest_first() {
        let pool = |name, free, all| Pool { size: pool_size(name).unwrap(), free, all };
        let pools = vec![pool("hugepages-1048576kB", 0, 0), pool("hugepages-2048kB", 3, 4)];
        let check = judge_hugetlb(pools);
        assert_eq!(check.result, "2 MiB: 3 of 4 free; 1 GiB: 0 of 0 free");
        assert_eq!(check.status, Status::Good);
        let empty = judge_hugetlb(vec![pool("hugepages-2048kB", 0, 4)]);
        assert!(empty.advice.unwrap().contains("vm.nr_hugepages"));
        assert_eq!(judge_hugetlb(Vec::new()).status, Status::Limited);
        assert!(pool_size("hugepages-many").is_none());
    }
}
