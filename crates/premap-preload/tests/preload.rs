//! The library preloaded into programs: this test's own small VMM, and programs that are none.
//!
//! The VMM is this very program, run again for its one ignored test with the library preloaded.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod vmm;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use premap_exec_settings::{HotplugPools, LIBRARY, Report, Seccomp, Settings, Strategy, VARIABLE};
use serde_json::Value;

/// The library, built with this test.
fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let places = own.ancestors().skip(1).take(2).map(|place| place.join(LIBRARY));
    places.into_iter().find(|place| place.is_file()).expect("cargo builds the library with its tests")
}

/// Whether `/dev/kvm` can be had; the reason on stderr where not.
fn kvm() -> bool {
    match kvm_ioctls::Kvm::new() {
        Ok(_) => true,
        Err(error) => {
            assert!(
                std::env::var_os("PREMAP_REQUIRE_KVM").is_none(),
                "PREMAP_REQUIRE_KVM is set, but /dev/kvm: {error}"
            );
            eprintln!("skipped: /dev/kvm: {error}");
            false
        }
    }
}

/// What a run left.
struct Done {
    output: Output,
    stdout: String,
    /// What the library said; the programs themselves say nothing there.
    stderr: String,
    events: Vec<Value>,
}

fn run(command: Command, settings: &Settings) -> Done {
    run_with_report(command, settings, std::io::pipe().unwrap())
}

fn run_with_report(
    mut command: Command,
    settings: &Settings,
    (mut reader, writer): (std::io::PipeReader, std::io::PipeWriter),
) -> Done {
    // The report's descriptor is the program's standard input, so that its number is known.
    let settings =
        Settings { report: settings.report.clone().or(Some(Report::Descriptor(0))), ..settings.clone() };
    command.env("LD_PRELOAD", library()).env(VARIABLE, settings.encode().unwrap()).stdin(writer);
    let output = command.output().unwrap();
    // Its end of the pipe is closed only with it.
    drop(command);
    let mut report = String::new();
    std::io::Read::read_to_string(&mut reader, &mut report).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Done {
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        events: report
            .lines()
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
        output,
    }
}

/// Runs the VMM; it must do all it has to do, whatever the library does.
#[track_caller]
fn run_vmm(what: &str, settings: &Settings) -> Done {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "vmm::vmm", "--nocapture"]).env(vmm::VARIABLE, what);
    let done = run(command, settings);
    assert!(done.output.status.success(), "{what}: {}\n{}", done.stdout, done.stderr);
    assert!(done.stdout.contains(vmm::DONE), "{}", done.stdout);
    done
}

fn events<'a>(done: &'a Done, event: &str) -> Vec<&'a Value> {
    done.events.iter().filter(|one| one["event"] == event).collect()
}

#[track_caller]
fn check_mapped(event: &Value) {
    let report = &event["report"];
    assert_eq!(report["host"]["mapped"], report["asked"], "{event}");
    let second = &report["second"];
    assert!(second["mapped"] == report["asked"] || !second["unsupported"].is_null(), "{event}");
}

#[test]
fn memory_is_mapped_before_the_guest_runs_and_its_faults_are_counted() {
    if !kvm() {
        return;
    }
    let done = run_vmm("plain", &Settings::default());
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 1, "{:?}", done.events);
    check_mapped(mapped[0]);
    assert_eq!(mapped[0]["vcpus"], 2, "vCPUs that never ran are lent");
    assert_eq!(mapped[0]["faults"], 0, "the guest has not run");
    assert!(mapped[0]["report"]["asked"].as_u64().unwrap() >= vmm::BYTES);
    let ended = events(&done, "ended");
    assert_eq!((ended.len(), &ended[0]["vcpus"], &ended[0]["runs"]), (1, &2.into(), &1.into()), "{ended:?}");
    assert!(ended[0]["exits"].as_u64().unwrap() > 0);
}

#[test]
fn with_no_strategy_faults_are_counted_and_nothing_is_mapped() {
    if !kvm() {
        return;
    }
    let done = run_vmm("plain", &Settings { strategy: Strategy::None, ..Settings::default() });
    assert!(events(&done, "mapped").is_empty());
    let ended = events(&done, "ended");
    assert!(ended[0]["faults"].is_u64() && ended[0]["runs"] == 0, "{ended:?}");
    assert_eq!(done.stderr, "");
}

#[test]
fn a_vm_that_is_closed_before_the_exit_is_told_then() {
    if !kvm() {
        return;
    }
    let done = run_vmm("close", &Settings::default());
    let numbers: Vec<_> = events(&done, "ended").iter().map(|event| event["vm"].clone()).collect();
    assert_eq!(numbers, [1, 2, 3], "{:?}", done.events);
}

#[test]
fn slots_that_come_later_are_mapped_once_they_are_at_rest() {
    if !kvm() {
        return;
    }
    let all = Settings { hotplug_pools: HotplugPools::Map, ..Settings::default() };
    let done = run_vmm("slots", &all);
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 2, "{:?}", done.events);
    let slots = |event: &Value| event["slots"].as_array().unwrap().len();
    assert_eq!(slots(mapped[1]), slots(mapped[0]) + 1);
    check_mapped(mapped[1]);
    assert!(mapped[1]["report"]["host"]["mapped"].as_u64().unwrap() >= vmm::BYTES);
}

#[test]
fn new_memory_that_comes_later_above_4_gib_is_left_and_told_and_known_memory_is_not() {
    if !kvm() {
        return;
    }
    let done = run_vmm("slots", &Settings::default());
    let mapped = events(&done, "mapped");
    let last = mapped.last().unwrap();
    assert_eq!((mapped.len(), last["left"].as_array().unwrap().len()), (2, 1), "{:?}", done.events);
    assert_eq!(
        (&last["left"][0]["gpa"], &last["left"][0]["bytes"], &last["left"][0]["why"]),
        (&(8_u64 << 30).into(), &vmm::BYTES.into(), &"maybe_hotplug".into())
    );
    assert!(done.stderr.contains("--hotplug-pools map"), "{}", done.stderr);
    // The same memory in other slots.
    let done = run_vmm("slots-anew", &Settings::default());
    let left: usize =
        events(&done, "mapped").iter().map(|event| event["left"].as_array().unwrap().len()).sum();
    assert_eq!(left, 0, "{:?}", done.events);
    assert!(!done.stderr.contains("--hotplug-pools"), "{}", done.stderr);
}

#[test]
fn slots_that_change_all_the_while_neither_wait_for_a_run_nor_break_it() {
    if !kvm() {
        return;
    }
    let done = run_vmm("churn", &Settings::default());
    let mapped = events(&done, "mapped");
    assert!((1..=16).contains(&mapped.len()), "{:?}", done.events);
    for (event, number) in mapped.iter().zip(1_u32..) {
        let report = &event["report"];
        assert_eq!((&event["run"], &event["version"]), (&number.into(), &1.into()));
        let memory = ["slots", "left", "known", "asked"].map(|part| event["memory"][part].as_u64().unwrap());
        assert_eq!(memory[0], memory[1..].iter().sum::<u64>(), "{event}");
        assert_eq!(memory[3], report["asked"].as_u64().unwrap(), "{event}");
        let host =
            ["mapped", "skipped", "failed", "abandoned"].map(|fate| report["host"][fate].as_u64().unwrap());
        assert_eq!(host.iter().sum::<u64>(), report["asked"].as_u64().unwrap(), "{event}");
        assert_eq!(host[2], 0, "{event}");
    }
    let ended = events(&done, "ended")[0];
    let sum = |event: &Value, path: &str| event.pointer(path).unwrap().as_u64().unwrap();
    let asked: u64 = mapped.iter().map(|event| sum(event, "/report/asked")).sum();
    assert_eq!(sum(ended, "/asked"), asked);
    for stage in ["host", "second"] {
        let fates = ["mapped", "skipped", "failed", "abandoned"];
        let all: u64 = fates.iter().map(|fate| sum(ended, &format!("/{stage}/{fate}"))).sum();
        assert_eq!(all, asked, "{ended}");
    }
    // Where every run was stopped by a change, they are used up.
    let (runs, last) = (mapped.len(), &mapped.last().unwrap()["report"]);
    let mapped: u64 = mapped.iter().map(|event| event["report"]["host"]["mapped"].as_u64().unwrap()).sum();
    assert!(mapped >= vmm::MUCH || runs == 16, "what one run did not get to, another did: {last}");
}

#[test]
fn memory_that_the_guest_may_be_given_later_is_left_and_told_unless_its_user_wants_it_mapped() {
    if !kvm() {
        return;
    }
    for what in ["pool", "pool-untold"] {
        let present = |done: &Done| -> u64 {
            done.stdout.lines().find_map(|line| line.strip_prefix("present: ")).unwrap().parse().unwrap()
        };
        let done = run_vmm(what, &Settings::default());
        let mapped = events(&done, "mapped")[0].clone();
        assert_eq!(mapped["left"].as_array().unwrap().len(), 1, "{mapped}");
        let left = &mapped["left"][0];
        assert_eq!(
            (&left["gpa"], &left["bytes"], &left["why"]),
            (&(8_u64 << 30).into(), &vmm::MUCH.into(), &"maybe_hotplug".into())
        );
        let memory = &mapped["memory"];
        assert_eq!((&memory["left"], &memory["asked"]), (&vmm::MUCH.into(), &(2 * vmm::BYTES).into()));
        assert!(
            done.stderr.contains("256 MiB") && done.stderr.contains("--hotplug-pools map"),
            "{}",
            done.stderr
        );
        assert!(present(&done) < vmm::MUCH, "{}", done.stdout);
        let all = Settings { hotplug_pools: HotplugPools::Map, ..Settings::default() };
        let done = run_vmm(what, &all);
        assert_eq!(events(&done, "mapped")[0]["left"].as_array().unwrap().len(), 0);
        assert!(present(&done) > vmm::MUCH, "{}", done.stdout);
    }
}

#[test]
fn a_vcpu_that_is_called_back_while_it_waits_says_eintr_and_the_run_goes_on_at_the_next_entry() {
    if !kvm() {
        return;
    }
    let done = run_vmm("called-back", &Settings::default());
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 3, "{:?}", done.events);
    for event in &mapped[..2] {
        let host = &event["report"]["host"];
        assert!(host["abandoned"].as_u64().unwrap() > 0, "{event}");
    }
    check_mapped(mapped[2]);
    assert_eq!(mapped[2]["vcpus"], 2, "vCPUs that never ran are lent");
}

#[test]
fn a_fork_s_child_has_vms_of_its_own_and_its_parent_s_go_on() {
    if !kvm() {
        return;
    }
    let done = run_vmm("fork", &Settings::default());
    let processes: std::collections::BTreeSet<_> =
        events(&done, "mapped").iter().map(|event| event["pid"].as_u64().unwrap()).collect();
    assert_eq!(processes.len(), 2, "{:?}", done.events);
}

#[test]
fn a_vmm_that_links_the_engine_itself_is_mapped_like_any_other() {
    if !kvm() {
        return;
    }
    let done = run_vmm("linked", &Settings::default());
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 1, "{:?}", done.events);
    check_mapped(mapped[0]);
}

#[test]
fn a_file_whose_name_is_no_text_is_no_matter() {
    if !kvm() {
        return;
    }
    let done = run_vmm("odd-path", &Settings::default());
    check_mapped(events(&done, "mapped")[0]);
}

#[test]
fn without_proc_the_missing_file_is_named_and_nobody_is_called_confined() {
    if !kvm() || !rustix::process::getuid().is_root() {
        return;
    }
    let done = run_vmm("chroot", &Settings::default());
    assert!(events(&done, "mapped").is_empty());
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("/proc/self/smaps") && !done.stderr.contains("seccomp"), "{}", done.stderr);
}

#[test]
fn a_vm_is_told_to_have_ended_whichever_way_its_descriptors_are_closed() {
    if !kvm() {
        return;
    }
    for what in ["closed-by-range", "closed-by-dup2", "closed-by-dup3"] {
        let done = run_vmm(what, &Settings::default());
        assert_eq!(events(&done, "ended").len(), 1, "{what}: {:?}", done.events);
    }
}

#[test]
fn a_child_that_shares_memory_has_descriptors_and_vms_of_its_own() {
    if !kvm() {
        return;
    }
    for what in ["closed-in-vfork", "vm-in-vfork"] {
        let done = run_vmm(what, &Settings::default());
        let mapped = events(&done, "mapped");
        assert_eq!(
            (mapped.len(), &mapped[0]["vm"], &mapped[0]["vcpus"]),
            (1, &1.into(), &2.into()),
            "{what}"
        );
        assert_eq!(events(&done, "ended").len(), 1, "{what}: {:?}", done.events);
    }
}

#[test]
fn a_vmm_has_its_threads_where_there_are_not_enough_for_all() {
    // The limit does not bind root, and only root can become somebody else.
    if !kvm() || !rustix::process::getuid().is_root() {
        return;
    }
    for what in ["few-threads", "no-threads", "spawned"] {
        let done = run_vmm(what, &Settings::default());
        assert!(events(&done, "mapped").is_empty(), "{what}: {:?}", done.events);
        assert_eq!(done.stderr.lines().count(), 1, "{what}: {}", done.stderr);
        assert!(done.stderr.contains("thread"), "{what}: {}", done.stderr);
    }
    // Whether the kernel needs a thread for a VM's first run depends on its version.
    run_vmm("kernel-thread", &Settings::default());
}

#[test]
fn the_mapper_s_thread_does_not_outlive_its_use() {
    if !kvm() {
        return;
    }
    let settings = Settings { follow_ns: 1, ..Settings::default() };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "vmm::vmm", "--nocapture"]).env(vmm::VARIABLE, "quiet");
    command.env("LD_PRELOAD", library()).env(VARIABLE, settings.encode().unwrap());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn memory_that_a_userfaultfd_handler_takes_over_while_it_is_mapped_holds_nothing_up() {
    if !kvm() {
        return;
    }
    let done = run_vmm("registered", &Settings::default());
    if done.stdout.contains("skipped") {
        eprintln!("{}", done.stdout);
        return;
    }
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 2, "{:?}", done.events);
    let left = mapped[1]["left"].as_array().unwrap();
    assert_eq!((left.len(), &left[0]["why"]), (1, &"userfault".into()), "{left:?}");
}

#[test]
fn no_file_is_opened_on_a_thread_of_the_vmm_s_once_it_has_the_device() {
    if !kvm() {
        return;
    }
    for what in ["no-files", "no-files-later", "no-files-when-idle"] {
        let done = run_vmm(what, &Settings::default());
        let mapped = events(&done, "mapped");
        assert_eq!(mapped.len(), 1, "{what}: {:?} {}", done.events, done.stderr);
        check_mapped(mapped[0]);
    }
}

#[test]
fn a_flag_that_a_handler_sets_while_its_vcpu_waits_stays_set() {
    if kvm() {
        run_vmm("called-until-seen", &Settings::default());
    }
}

#[test]
fn a_vcpu_that_enters_with_the_flag_set_is_given_back_at_once() {
    if !kvm() {
        return;
    }
    // Of several, since the machine may be busy. A thread that is not told of the pages waits 50 ms each time.
    let took = || -> u64 {
        let done = run_vmm("exit-wanted", &Settings::default());
        done.stdout.lines().find_map(|line| line.strip_prefix("took: ")).unwrap().parse().unwrap()
    };
    let least = (0..4).map(|_| took()).min().unwrap();
    assert!(least < 45_000, "{least} µs");
}

#[test]
fn results_and_errno_are_the_kernel_s() {
    if kvm() {
        run_vmm("errno", &Settings::default());
    }
}

#[test]
fn a_confined_vmm_is_left_alone_unless_its_user_trusts_it() {
    if !kvm() {
        return;
    }
    for what in ["confined-before", "confined-after"] {
        let done = run_vmm(what, &Settings::default());
        assert!(events(&done, "mapped").is_empty(), "{what}");
        assert_eq!(events(&done, "stepped_aside").len(), 1, "{what}: {:?}", done.events);
        assert_eq!(done.stderr.lines().count(), 1, "{what}: {}", done.stderr);
        for part in ["seccomp", "0xc040aed5", "--seccomp trust"] {
            assert!(done.stderr.contains(part), "{what}: {}", done.stderr);
        }
        let done = run_vmm(what, &Settings { seccomp: Seccomp::Trust, ..Settings::default() });
        assert_eq!(events(&done, "mapped").len(), 1, "{what}: {}", done.stderr);
    }
}

#[test]
fn a_vcpu_s_thread_under_a_strict_filter_does_nothing_that_kills_it() {
    if !kvm() {
        return;
    }
    let done = run_vmm("strict", &Settings::default());
    let mapped = events(&done, "mapped");
    assert_eq!(mapped.len(), 1, "{:?} {}", done.events, done.stderr);
    check_mapped(mapped[0]);
}

#[test]
fn what_is_said_is_never_written_on_a_thread_of_the_vmm() {
    if !kvm() {
        return;
    }
    // The filter of the vCPU's thread has no `write`.
    let done = run_vmm("strict", &Settings { chunk: Some(5), ..Settings::default() });
    assert!(done.stderr.contains("VM 1 is not mapped"), "{}", done.stderr);
}

#[test]
fn what_fails_is_one_line_and_the_vmm_goes_on() {
    if !kvm() {
        return;
    }
    // A chunk that the engine refuses: the run fails, the VM runs.
    let done = run_vmm("plain", &Settings { chunk: Some(5), ..Settings::default() });
    assert_eq!(events(&done, "failed").len(), 1, "{:?}", done.events);
    assert!(
        done.stderr.contains("VM 1 is not mapped") && done.stderr.lines().count() == 1,
        "{}",
        done.stderr
    );
    // A report that can't be written: the memory is mapped all the same.
    let report = Some(Report::File("/nowhere/report".into()));
    let done = run_vmm("plain", &Settings { report, ..Settings::default() });
    assert!(done.stderr.contains("/nowhere/report"), "{}", done.stderr);
    // Settings of another version: nothing is mapped.
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "vmm::vmm", "--nocapture"]).env(vmm::VARIABLE, "plain");
    let output = command.env("LD_PRELOAD", library()).env(VARIABLE, "{").output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(VARIABLE) && said.lines().count() == 1, "{said}");
}

#[test]
fn a_report_that_nobody_reads_holds_no_guest_back_and_is_given_up_in_one_line() {
    if !kvm() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    // A blank line is no event; a pipe with little room left has none for a whole event.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut filler = std::fs::File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    while filler.write(b"\n\n\n\n").is_ok() {}
    drop(filler);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "vmm::vmm", "--nocapture"]).env(vmm::VARIABLE, "close");
    // The reader is at it only once the VMM has ended: were a vCPU to wait for it, that would be never.
    let done = run_with_report(command, &Settings::default(), (reader, writer));
    assert!(done.stdout.contains(vmm::DONE), "{}", done.stdout);
    let said = done.stderr.lines().filter(|line| line.contains("the report ends here")).count();
    assert_eq!(said, 1, "{}", done.stderr);
}

/// Runs a program as the process that the command becomes.
fn run_own(program: &[&str]) -> Done {
    let settings =
        Settings { process: Some(4_242), report: Some(Report::Descriptor(0)), ..Settings::default() };
    let mut command = Command::new("sh");
    command
        .args(["-c", "PREMAP_EXEC=$(echo \"$WANTED\" | sed s/4242/$$/) LD_PRELOAD=$WHERE exec \"$@\"", "sh"])
        .args(program);
    command.env("WANTED", settings.encode().unwrap()).env("WHERE", library());
    let (mut reader, writer) = std::io::pipe().unwrap();
    let output = command.stdin(writer).output().unwrap();
    drop(command);
    let mut report = String::new();
    std::io::Read::read_to_string(&mut reader, &mut report).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Done {
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        events: report.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        output,
    }
}

#[test]
fn where_no_vm_was_made_that_is_told_at_the_exit() {
    if !kvm() {
        return;
    }
    let own = std::env::current_exe().unwrap();
    // `env` is another program, but the same process.
    let vmm = |what: &str| {
        let variable = format!("{}={what}", vmm::VARIABLE);
        let program = [&variable, own.to_str().unwrap(), "--ignored", "--exact", "vmm::vmm", "--nocapture"];
        let done = run_own(&[&["env"], &program[..]].concat());
        assert!(done.output.status.success() && done.stdout.contains(vmm::DONE), "{}", done.stdout);
        done
    };
    let done = vmm("nothing");
    assert_eq!((done.stderr.lines().count(), done.events.len()), (1, 1), "{} {:?}", done.stderr, done.events);
    assert!(done.stderr.contains("no VM was made through KVM"), "{}", done.stderr);
    assert_eq!(done.events[0]["event"], "no_vm");
    // What became of a program's children, they tell.
    let done = vmm("children");
    assert_eq!((done.stderr.as_str(), done.events.len()), ("", 1), "{:?}", done.events);
    // It has one.
    let done = vmm("plain");
    assert!(!done.stderr.contains("no VM"), "{}", done.stderr);
    assert!(events(&done, "no_vm").is_empty() && events(&done, "mapped").len() == 1, "{:?}", done.events);
}

#[test]
fn a_program_whose_environment_was_cleared_is_told_to_be_out_of_reach() {
    let done = run_own(&["env", "-i", "/bin/sh", "-c", "exit 3"]);
    assert_eq!(done.output.status.code(), Some(3));
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("/bin/sh") && done.stderr.contains("LD_PRELOAD"), "{}", done.stderr);
    assert_eq!(
        (done.events.len(), &done.events[0]["event"]),
        (1, &"not_preloaded".into()),
        "{:?}",
        done.events
    );
}

#[test]
fn a_program_without_a_vm_is_untouched() {
    for (program, argument) in [("ls", "/"), ("cat", "/proc/self/limits"), ("sh", "-c exit 3")] {
        let command = || {
            let mut command = Command::new(program);
            command.args(argument.splitn(2, ' '));
            command
        };
        let plain = command().output().unwrap();
        let done = run(command(), &Settings::default());
        assert_eq!(done.output, plain, "{program}");
        assert!(done.events.is_empty(), "{program}");
    }
    let mut command = Command::new("cat");
    command.arg("/proc/self/status");
    let done = run(command, &Settings::default());
    assert!(done.stdout.contains("Threads:\t1\n"), "{}", done.stdout);
}
