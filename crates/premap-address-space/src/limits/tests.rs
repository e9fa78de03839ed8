//! The limits of made-up hosts, of this one, and of a cgroup that is made for the purpose.

use std::fs;

use super::*;

/// A directory that looks like a host's root.
struct Host(PathBuf);

impl Host {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("premap-limits-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path).with("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    }

    fn with(self, path: &str, text: &str) -> Self {
        let path = self.0.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn v2(self, group: &str) -> Self {
        self.with("/proc/self/cgroup", &format!("0::{group}\n"))
            .with("/proc/self/mountinfo", "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    }

    fn v1(self, group: &str) -> Self {
        self.with("/proc/self/cgroup", &format!("4:memory:{group}\n3:hugetlb:{group}\n")).with(
            "/proc/self/mountinfo",
            "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n36 31 0:33 / /cg/huge rw - cgroup cgroup rw,hugetlb\n",
        )
    }

    #[track_caller]
    fn check(&self, pages: Pages, mapping: Mapping, kind: LimitKind, left: u64, told: &str) {
        let limit = Limits::find_below(&self.0).tightest(pages, mapping).unwrap();
        assert_eq!((limit.kind, limit.left), (kind, left), "{limit:?}");
        assert_eq!(limit.to_string(), told);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const MIB: u64 = 1 << 20;
const HUGE: Pages = Pages::Hugetlb(2 * MIB);

#[test]
fn without_cgroups_the_host_s_available_memory_is_the_limit() {
    let told = "the memory that the host has available (16384 of 32768 MiB)";
    Host::new("bare").check(Pages::Ordinary, Mapping::Made, LimitKind::Available, 16 << 30, told);
}

#[test]
fn a_cpuset_that_leaves_some_numa_nodes_out_bounds_what_the_host_has() {
    let node = |host: Host, node: u32, free: u64| {
        let fields = [
            ("MemTotal", 8 << 20),
            ("MemFree", free),
            ("Active(file)", 4096),
            ("Inactive(file)", 1024),
            ("KReclaimable", 2048),
        ];
        let text: String =
            fields.map(|(name, kib)| format!("Node {node} {name}:  {kib} kB\n")).into_iter().collect();
        host.with(&format!("/sys/devices/system/node/node{node}/meminfo"), &text)
    };
    let mut host = Host::new("numa").with("/sys/devices/system/node/has_memory", "0-1,3\n");
    for (number, free) in [(0, 1 << 20), (1, 2 << 20), (3, 4 << 20)] {
        host = node(host, number, free);
    }
    // Node 2 has processors and no memory.
    let allow =
        |host: Host, nodes: &str| host.with("/proc/self/status", &format!("Mems_allowed_list:\t{nodes}\n"));
    let left = (3 << 30) + 2 * 4 * MIB;
    let told = "the memory that the host has available on the NUMA nodes of this process's cpuset \
                (3080 of 16384 MiB)";
    host = allow(host, "0-2");
    host.check(Pages::Ordinary, Mapping::Made, LimitKind::Available, left, told);
    let whole = "the memory that the host has available (16384 of 32768 MiB)";
    for all in ["0-3", "0-1,3", "what is this", "0-99999999999"] {
        host = allow(host, all);
        host.check(Pages::Ordinary, Mapping::Made, LimitKind::Available, 16 << 30, whole);
    }
}

#[test]
fn without_proc_there_is_no_limit() {
    let nothing = Limits::find_below(Path::new("/nowhere"));
    assert_eq!(nothing.tightest(Pages::Ordinary, Mapping::Made), None);
    assert_eq!(nothing.tightest(HUGE, Mapping::Made), None);
}

#[test]
fn the_tightest_group_above_counts_and_file_pages_do_not() {
    let host = Host::new("v2")
        .v2("/vms/one")
        .with("/sys/fs/cgroup/vms/one/memory.max", "max\n")
        .with("/sys/fs/cgroup/vms/one/memory.high", "max\n")
        .with("/sys/fs/cgroup/vms/one/memory.current", "4096\n")
        .with("/sys/fs/cgroup/vms/memory.max", "209715200\n")
        .with("/sys/fs/cgroup/vms/memory.current", "104857600\n")
        .with("/sys/fs/cgroup/vms/memory.stat", "anon 1\ninactive_file 41943040\nactive_file 20971520\n");
    let told = "the memory limit of cgroup /sys/fs/cgroup/vms (memory.max, 200 MiB)";
    host.check(Pages::Ordinary, Mapping::Made, LimitKind::Cgroup, 150 * MIB, told);
    let host = host.with("/sys/fs/cgroup/vms/one/memory.high", "104857600\n");
    let told = "the memory limit of cgroup /sys/fs/cgroup/vms/one (memory.high, 100 MiB)";
    host.check(Pages::Ordinary, Mapping::Made, LimitKind::Cgroup, 100 * MIB - 4096, told);
}

#[test]
fn version_1_counts_swap_where_that_is_tighter_and_skips_groups_that_count_only_themselves() {
    let host = Host::new("v1")
        .v1("/a/b")
        .with("/cg/memory/a/b/memory.limit_in_bytes", "209715200\n")
        .with("/cg/memory/a/b/memory.usage_in_bytes", "52428800\n")
        .with("/cg/memory/a/b/memory.memsw.limit_in_bytes", "209715200\n")
        .with("/cg/memory/a/b/memory.memsw.usage_in_bytes", "104857600\n")
        .with("/cg/memory/a/b/memory.stat", "inactive_file 7\ntotal_inactive_file 52428800\n")
        .with("/cg/memory/a/memory.use_hierarchy", "0\n")
        .with("/cg/memory/a/memory.limit_in_bytes", "4096\n")
        .with("/cg/memory/a/memory.usage_in_bytes", "4096\n")
        .with("/cg/memory/memory.limit_in_bytes", "9223372036854771712\n")
        .with("/cg/memory/memory.usage_in_bytes", "9223372036854771712\n");
    host.check(
        Pages::Ordinary,
        Mapping::Made,
        LimitKind::Cgroup,
        150 * MIB,
        "the memory limit of cgroup /cg/memory/a/b (memory.memsw.limit_in_bytes, 200 MiB)",
    );
}

#[test]
fn a_limit_above_what_is_mounted_is_told_by_the_group_below() {
    let host = Host::new("hidden")
        .v1("/")
        .with("/cg/memory/memory.limit_in_bytes", "9223372036854771712\n")
        .with("/cg/memory/memory.usage_in_bytes", "52428800\n")
        .with("/cg/memory/memory.stat", "hierarchical_memory_limit 104857600\n");
    let told = "the memory limit of cgroup /cg/memory (memory.stat, 100 MiB)";
    host.check(Pages::Ordinary, Mapping::Made, LimitKind::Cgroup, 50 * MIB, told);
}

#[test]
fn hugetlb_pages_come_from_their_own_pool_and_reserved_ones_only_to_their_mapping() {
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let host = Host::new("pool")
        .with(&format!("{pool}/nr_hugepages"), "100\n")
        .with(&format!("{pool}/free_hugepages"), "60\n")
        .with(&format!("{pool}/resv_hugepages"), "20\n")
        .with(&format!("{pool}/nr_overcommit_hugepages"), "3\n")
        .with(&format!("{pool}/surplus_hugepages"), "1\n");
    let told = |left: u64| format!("the host's pool of hugetlb pages ({left} of 204 MiB free)");
    host.check(HUGE, Mapping::Made, LimitKind::HugetlbPool, 124 * MIB, &told(124));
    let limits = Limits::find_below(&host.0).read(HUGE, Mapping::Planned);
    assert_eq!(limits[0].to_string(), told(84));
    assert_eq!(limits[0].spare(), limits[0].left, "these pages need no margin");
}

#[test]
fn hugetlb_cgroups_of_both_versions_are_read_and_reservations_bound_new_mappings() {
    let host = Host::new("huge2")
        .v2("/a")
        .with("/sys/fs/cgroup/a/hugetlb.2MB.max", "104857600\n")
        .with("/sys/fs/cgroup/a/hugetlb.2MB.current", "4194304\n")
        .with("/sys/fs/cgroup/a/hugetlb.2MB.rsvd.max", "52428800\n")
        .with("/sys/fs/cgroup/a/hugetlb.2MB.rsvd.current", "52428800\n")
        .with("/sys/fs/cgroup/a/hugetlb.1GB.max", "0\n")
        .with("/sys/fs/cgroup/a/hugetlb.1GB.current", "0\n");
    let told = "the hugetlb limit of cgroup /sys/fs/cgroup/a (hugetlb.2MB.max, 100 MiB)";
    host.check(HUGE, Mapping::Made, LimitKind::HugetlbCgroup, 96 * MIB, told);
    let told = "the hugetlb limit of cgroup /sys/fs/cgroup/a (hugetlb.2MB.rsvd.max, 50 MiB)";
    host.check(HUGE, Mapping::Planned, LimitKind::HugetlbCgroup, 0, told);
    let host = Host::new("huge1")
        .v1("/a")
        .with("/cg/huge/a/hugetlb.2MB.limit_in_bytes", "104857600\n")
        .with("/cg/huge/a/hugetlb.2MB.usage_in_bytes", "4194304\n");
    let told = "the hugetlb limit of cgroup /cg/huge/a (hugetlb.2MB.limit_in_bytes, 100 MiB)";
    host.check(HUGE, Mapping::Made, LimitKind::HugetlbCgroup, 96 * MIB, told);
}

#[test]
fn a_margin_is_left_of_every_size_of_limit() {
    let spare = |bytes| Limit { kind: LimitKind::Cgroup, path: None, bytes, left: bytes }.spare();
    assert_eq!(spare(8 * MIB), 0);
    assert_eq!(spare(200 * MIB), 168 * MIB);
    assert_eq!(spare(1 << 30), (1 << 30) - 64 * MIB);
    assert_eq!(spare(1 << 40), (1 << 40) - (1 << 30));
}

#[test]
fn this_host_has_limits_that_make_sense() {
    let limit = Limits::find().tightest(Pages::Ordinary, Mapping::Planned).unwrap();
    assert!(limit.left <= limit.bytes && limit.bytes > MIB, "{limit:?}");
}
