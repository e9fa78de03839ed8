//! Runs in memory cgroups that are smaller than their plans. Each test runs itself again in a cgroup of its own, where it
//! would be killed if more were mapped than there is.
// UNSAFETY: drops the page tables of shared memory of its own.
#![expect(unsafe_code, reason = "madvise")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cgroup;

use std::process::{Child, Stdio};

use cgroup::Cgroup;
use premap::{Budget, Engine, Gpa, HostLimit, HostMemory, Plan, Reason, Report, Stages, Touch};
use premap_guest::{Backing, Memory};
use premap_kvm::linux::Vcpu;
use rustix::mm::{Advice, madvise};

const MIB: u64 = 1 << 20;
/// Set in the process that runs in a cgroup.
const WITHIN: &str = "PREMAP_TEST_WITHIN_CGROUP";

fn is_within() -> bool {
    std::env::var_os(WITHIN).is_some()
}

/// Starts this program's test of that name in the cgroup.
fn start(group: &Cgroup, test: &str) -> Child {
    let mut command = group.command(&std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(WITHIN, "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for it; what it said, if it lived.
#[track_caller]
fn lived(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}

/// Makes new memory present as far as it may be.
fn populate(memory: &Memory, host_memory: HostMemory) -> Report {
    populate_by(1, memory, host_memory)
}

fn populate_by(threads: usize, memory: &Memory, host_memory: HostMemory) -> Report {
    let plan = Plan::new([memory.region(Gpa::new(0), Touch::Write)]).unwrap();
    let budget = Budget { host_memory, ..Budget::default() };
    let mut none: [Vcpu<std::os::fd::OwnedFd>; 0] = [];
    let mut engine = Engine::new().stages(Stages::Host).host_threads(threads).budget(budget);
    let report = engine.run(&plan, &mut none).unwrap();
    assert_eq!(report.host.bytes(), report.asked, "{report:?}");
    println!("mapped {} MiB, limit {:?}", report.host.mapped / MIB, report.limit);
    report
}

#[test]
fn a_plan_larger_than_its_cgroup_is_left_to_demand_and_the_limit_is_named() {
    if is_within() {
        let memory = Memory::new(512 * MIB, Backing::Anonymous).unwrap();
        memory.write_word(100 * MIB, 1);
        let report = populate(&memory, HostMemory::Whole);
        assert!(report.host.mapped <= 2 * MIB, "only what is present: {report:?}");
        let lost = report.unmapped.first().unwrap();
        assert_eq!(lost.reason, Reason::HostMemory(HostLimit::Cgroup));
        return;
    }
    let Some(group) = Cgroup::new("whole", 200 * MIB) else { return };
    let said = lived(start(&group, "a_plan_larger_than_its_cgroup_is_left_to_demand_and_the_limit_is_named"));
    assert!(said.contains(&group.told()) && said.contains("200 MiB)"), "{said}");
}

#[test]
fn a_front_that_is_needed_is_mapped_up_to_the_limit_less_a_margin() {
    if is_within() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = Memory::new(512 * MIB, backing).unwrap();
            let report = populate(&memory, HostMemory::Front);
            let mapped = report.host.mapped / MIB;
            assert!((100..=170).contains(&mapped), "{backing}: {report:?}");
            let report = populate(&memory, HostMemory::Front);
            assert!(report.host.mapped / MIB >= mapped - 1, "{backing}: what is present is kept: {report:?}");
        }
        let memory = Memory::new(512 * MIB, Backing::Anonymous).unwrap();
        let report = populate(&memory, HostMemory::UpTo(64 * MIB));
        assert!((60..=64).contains(&(report.host.mapped / MIB)), "{report:?}");
        return;
    }
    let Some(group) = Cgroup::new("front", 200 * MIB) else { return };
    let said = lived(start(&group, "a_front_that_is_needed_is_mapped_up_to_the_limit_less_a_margin"));
    assert!(said.contains(&group.told()), "{said}");
}

#[test]
fn runs_side_by_side_in_one_cgroup_share_what_there_is() {
    if is_within() {
        let memory = Memory::new(200 * MIB, Backing::Anonymous).unwrap();
        populate(&memory, HostMemory::Whole);
        // Until all have come so far.
        std::thread::sleep(std::time::Duration::from_secs(1));
        return;
    }
    let Some(group) = Cgroup::new("side", 320 * MIB) else { return };
    let children = [(); 2].map(|()| start(&group, "runs_side_by_side_in_one_cgroup_share_what_there_is"));
    let said = children.map(lived).concat();
    assert!(said.contains(&group.told()), "one of them had to give way: {said}");
}

#[test]
fn a_plan_that_fits_is_mapped_whole_by_many_threads() {
    if is_within() {
        let memory = Memory::new(460 * MIB, Backing::Anonymous).unwrap();
        let report = populate_by(8, &memory, HostMemory::Whole);
        assert_eq!((report.host.mapped, report.limit), (460 * MIB, None));
        return;
    }
    let Some(group) = Cgroup::new("many", 512 * MIB) else { return };
    lived(start(&group, "a_plan_that_fits_is_mapped_whole_by_many_threads"));
}

#[test]
fn shared_memory_that_was_filled_before_is_mapped_whatever_the_limit() {
    if is_within() {
        let memory = Memory::new(160 * MIB, Backing::Memfd).unwrap();
        populate(&memory, HostMemory::Whole);
        let base = std::ptr::with_exposed_provenance_mut(usize::try_from(memory.hva().raw()).unwrap());
        // SAFETY: of shared memory the content stays; it is only no longer mapped, as in a process that comes later.
        unsafe { madvise(base, usize::try_from(memory.bytes()).unwrap(), Advice::LinuxDontNeed) }.unwrap();
        let report = populate(&memory, HostMemory::Whole);
        assert_eq!((report.host.mapped, report.limit), (160 * MIB, None));
        return;
    }
    let Some(group) = Cgroup::new("filled", 200 * MIB) else { return };
    lived(start(&group, "shared_memory_that_was_filled_before_is_mapped_whatever_the_limit"));
}
