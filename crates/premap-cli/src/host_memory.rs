//! Whether the host, and every limit above this process, can give what a guest takes.
//!
//! A guest here touches all of its memory. Beyond a limit it is not refused then: the kernel kills the command, without a
//! word. So it is refused before.

use premap_address_space::limits::{Limit, LimitKind, Limits, Mapping, Pages};
use premap_guest::Backing;

use crate::failure::BadUse;
use crate::size::Size;

/// Refuses more memory for a guest than can be had. What can't be known refuses nothing.
pub(crate) fn check(asked: Size, backing: Backing) -> Result<(), BadUse> {
    let pages = match backing {
        Backing::Hugetlb => Pages::Hugetlb(backing.page_size().bytes()),
        _ => Pages::Ordinary,
    };
    // Whether the pool has enough is seen by an attempt, whose error names the setting.
    let limits = Limits::find().read(pages, Mapping::Planned).into_iter();
    fits(asked, Need::of(backing), limits.filter(|limit| limit.kind != LimitKind::HugetlbPool))
}

/// Refuses a TD that is larger than what its model can be had for.
pub(crate) fn check_td(asked: Size) -> Result<(), BadUse> {
    fits(asked, Need::Model, Limits::find().read(Pages::Ordinary, Mapping::Planned))
}

/// What memory of a guest takes on the host.
#[derive(Clone, Copy, Debug)]
enum Need {
    /// Itself, and the tables of the host's and of either KVM.
    Guest,
    /// The same, and once more in the page cache.
    GuestAndFile,
    /// Pages set apart already, which need no tables worth counting.
    Hugetlb,
    /// Of a TD no page has content, but each is accounted for: 12.5 MiB a GiB were seen, and 12 MiB for the rest.
    Model,
}

impl Need {
    fn of(backing: Backing) -> Self {
        match backing {
            Backing::Hugetlb => Self::Hugetlb,
            Backing::File => Self::GuestAndFile,
            _ => Self::Guest,
        }
    }

    fn bytes(self, memory: u64) -> u64 {
        match self {
            Self::Guest => memory.saturating_add(memory / 128),
            Self::GuestAndFile => memory.saturating_mul(2).saturating_add(memory / 128),
            Self::Hugetlb => memory,
            Self::Model => (memory / 64).saturating_add(16 << 20),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Guest | Self::Hugetlb => "it takes",
            Self::GuestAndFile => "a file and its copy take",
            Self::Model => "the model of so large a TD takes",
        }
    }
}

fn fits(asked: Size, need: Need, limits: impl IntoIterator<Item = Limit>) -> Result<(), BadUse> {
    let Some(limit) = limits.into_iter().min_by_key(Limit::spare) else { return Ok(()) };
    let (needed, spare) = (need.bytes(asked.0), limit.spare());
    if needed <= spare {
        return Ok(());
    }
    let left = match limit.kind {
        LimitKind::Available => format!("this host has {} available", Size(limit.left)),
        _ => format!("{limit} leaves {}", Size(limit.left)),
    };
    let margin = match limit.margin() {
        0 => String::new(),
        margin => format!(", {} of it kept as a margin", Size(margin.min(limit.left))),
    };
    let powers = (12..=asked.0.max(1).ilog2()).rev().map(|power| 1_u64 << power);
    let less = powers.into_iter().find(|bytes| *bytes < asked.0 && need.bytes(*bytes) <= spare);
    let less = less.map(|bytes| format!("give less, such as {}", Size(bytes).flag()));
    let raise = match limit.kind {
        LimitKind::Available => "free some",
        _ => "raise the limit",
    };
    let remedy = less.map_or_else(|| raise.to_owned(), |less| format!("{less}, or {raise}"));
    Err(BadUse(format!(
        "--memory {}: {} {}, and {left}{margin}; {remedy}",
        asked.flag(),
        need.words(),
        Size(needed)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(asked: u64, need: Need, limit: Limit, expected: &str) {
        let error = fits(Size(asked), need, [limit]).unwrap_err().to_string();
        assert_eq!(error, expected);
    }

    fn host(left: u64) -> Limit {
        Limit { kind: LimitKind::Available, path: None, bytes: 8 << 30, left }
    }

    fn cgroup(bytes: u64) -> Limit {
        let path = Some("/sys/fs/cgroup/vm/memory.max".into());
        Limit { kind: LimitKind::Cgroup, path, bytes, left: bytes }
    }

    #[test]
    fn too_much_is_refused_with_value_limit_and_remedy() {
        check(
            4 << 30,
            Need::Guest,
            host(3 << 30),
            "--memory 4G: it takes 4 GiB, and this host has 3 GiB available, 512 MiB of it kept as a margin; \
             give less, such as 2G, or free some",
        );
        check(
            512 << 20,
            Need::Guest,
            cgroup(64 << 20),
            "--memory 512M: it takes 516 MiB, and the memory limit of cgroup /sys/fs/cgroup/vm (memory.max, 64 MiB) leaves 64 MiB, \
             32 MiB of it kept as a margin; give less, such as 16M, or raise the limit",
        );
        check(
            256 << 30,
            Need::Model,
            cgroup(1 << 30),
            "--memory 256G: the model of so large a TD takes 4 GiB, and the memory limit of cgroup /sys/fs/cgroup/vm \
             (memory.max, 1024 MiB) leaves 1 GiB, 64 MiB of it kept as a margin; give less, such as 32G, or raise the limit",
        );
        let error = fits(Size(2 << 30), Need::of(Backing::File), [host(3 << 30)]).unwrap_err().to_string();
        assert!(error.contains("a file and its copy take 4 GiB") && error.contains("such as 1G"), "{error}");
    }

    #[test]
    fn the_tightest_limit_is_the_one_that_is_told() {
        let error = fits(Size(4 << 30), Need::Guest, [host(5 << 30), cgroup(1 << 30), cgroup(2 << 30)]);
        assert!(error.unwrap_err().to_string().contains("1024 MiB)"));
    }

    #[test]
    fn what_fits_is_let_through_and_so_is_everything_where_nothing_is_known() {
        assert!(fits(Size(2 << 30), Need::Guest, [host(3 << 30)]).is_ok());
        assert!(fits(Size(1 << 40), Need::Guest, []).is_ok());
    }

    #[test]
    fn no_room_at_all_suggests_no_size() {
        check(
            1 << 20,
            Need::Guest,
            cgroup(16 << 20),
            "--memory 1M: it takes 1 MiB, and the memory limit of cgroup /sys/fs/cgroup/vm (memory.max, 16 MiB) leaves 16 MiB, \
             16 MiB of it kept as a margin; raise the limit",
        );
    }
}
