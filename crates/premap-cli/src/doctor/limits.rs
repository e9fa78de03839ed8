//! How much memory there is to take, and what limits it.

use premap_address::PageSize;
use premap_address_space::limits::{Limit, LimitKind, Limits, Mapping, Pages};

use super::check::{Check, Status};
use crate::size::Size;

/// The limits on ordinary memory, and on hugetlb pages.
pub(super) fn checks() -> [Check; 2] {
    let limits = Limits::find();
    let mut huge = Vec::new();
    for page in [PageSize::Size2M, PageSize::Size1G] {
        let of_page = limits.read(Pages::Hugetlb(page.bytes()), Mapping::Planned);
        huge.extend(of_page.into_iter().filter(|limit| limit.kind == LimitKind::HugetlbCgroup));
    }
    [memory(limits.read(Pages::Ordinary, Mapping::Planned)), hugetlb(huge)]
}

fn memory(limits: Vec<Limit>) -> Check {
    let name = "memory limits";
    let Some(tightest) = limits.into_iter().min_by_key(Limit::spare) else {
        return Check::new(name, Status::Limited, "unknown")
            .advise("mount /proc, so that premap can keep within them");
    };
    let room = Size(tightest.spare());
    match tightest.kind {
        LimitKind::Available => {
            Check::good(name, format!("none below what the host has available; room for {room}"))
        }
        _ => Check::new(name, Status::Limited, format!("room for {room}: {tightest}")).advise(
            "a larger guest is not mapped ahead, unless `premap exec --limit SIZE` says how much may be; or raise the limit",
        ),
    }
}

fn hugetlb(limits: Vec<Limit>) -> Check {
    let name = "hugetlb limits";
    match limits.into_iter().min_by_key(Limit::spare) {
        None => Check::good(name, "no cgroup limits hugetlb pages"),
        Some(tightest) => {
            let room = Size(tightest.spare());
            Check::new(name, Status::Limited, format!("room for {room}: {tightest}"))
                .advise("only for --backing hugetlb and the like: a guest that touches more is killed; raise the limit")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(kind: LimitKind, mib: u64) -> Limit {
        Limit { kind, path: Some("/sys/fs/cgroup/vm/max".into()), bytes: mib << 20, left: mib << 20 }
    }

    #[test]
    fn the_tightest_limit_is_named_with_the_room_below_it() {
        let check = memory(vec![limit(LimitKind::Available, 4096), limit(LimitKind::Cgroup, 200)]);
        assert_eq!(check.status, Status::Limited);
        assert_eq!(
            check.result,
            "room for 168 MiB: the memory limit of cgroup /sys/fs/cgroup/vm (max, 200 MiB)"
        );
        assert!(check.advice.unwrap().contains("--limit SIZE"));
        assert_eq!(memory(vec![limit(LimitKind::Available, 4096)]).status, Status::Good);
        assert_eq!(memory(Vec::new()).result, "unknown");
    }

    #[test]
    fn a_hugetlb_cgroup_is_told_too() {
        assert_eq!(hugetlb(Vec::new()).status, Status::Good);
        let check = hugetlb(vec![limit(LimitKind::HugetlbCgroup, 64)]);
        assert_eq!(
            check.result,
            "room for 64 MiB: the hugetlb limit of cgroup /sys/fs/cgroup/vm (max, 64 MiB)"
        );
        assert_eq!(check.status, Status::Limited);
    }
}
