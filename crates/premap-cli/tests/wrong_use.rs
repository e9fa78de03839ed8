//! Wrong use is one clear line on stderr that names the value and the remedy, and never a panic.

mod command;

use std::io::{PipeWriter, pipe};
use std::process::Command;

use command::premap;

#[track_caller]
fn check(arguments: &str, code: i32, parts: &[&str]) {
    let done = premap(arguments);
    assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    for part in parts {
        assert!(done.stderr.contains(part), "{part:?} is not in {:?}", done.stderr);
    }
}

#[test]
fn bad_values_are_named_with_a_remedy() {
    check("run --memory 0", 2, &["--memory 0", "give 4K or more"]);
    check("run --memory 3", 2, &["--memory 3", "4 KiB", "give 4K"]);
    check("run --memory 5X", 2, &["--memory 5X", "512M"]);
    check("run --memory -1", 2, &["--memory -1", "512M"]);
    check("run --backing nvme", 2, &["--backing nvme", "anon, thp, memfd, hugetlb, file"]);
    check("run --strategy best", 2, &["--strategy best", "two-stage"]);
    check("run --vcpus 0", 2, &["--vcpus 0", "1 to 1024"]);
    check("run --chunk 5000", 2, &["--chunk 5000", "4 KiB"]);
    check("run --deadline soon", 2, &["--deadline soon", "500ms"]);
    check("run --backing hugetlb --memory 1M", 2, &["--memory 1M", "2 MiB"]);
    check("run --profile 5.4", 2, &["--profile 5.4", "6.12"]);
    check("run --turbo", 2, &["--turbo", "no such flag"]);
    check("jog", 2, &["jog", "--help"]);
}

#[test]
fn a_linux_guest_that_can_t_be_had_is_told_before_anything_is_made() {
    check("run --guest linux --backend soft --kernel /nowhere", 1, &["--kernel /nowhere", "os error 2"]);
    check("run --guest linux --kernel /etc/hostname", 2, &["--kernel /etc/hostname", "not a bzImage"]);
    check("run --guest linux --time-limit 5", 2, &["--time-limit 5", "500ms"]);
    check("run --guest linux --touch read", 2, &["--touch", "Linux touches what it likes"]);
    check("run --guest linux --order random", 2, &["--order", "leave it away"]);
    check("run --kernel /boot/vmlinuz", 2, &["--kernel", "add --guest linux"]);
    check("run --marker up", 2, &["--marker", "add --guest linux"]);
    check("run --guest windows", 2, &["--guest windows", "first-touch, linux"]);
}

#[test]
fn more_memory_than_the_host_has_is_refused_before_anything_is_mapped() {
    check("run --memory 1024T", 2, &["--memory 1024T", "available", "give less, such as"]);
}

#[test]
fn a_missing_or_forbidden_device_is_told_with_path_errno_and_remedy() {
    // Whether the device can be opened is the machine's affair; as nobody it mostly can't.
    let done = premap("run --backend kvm --memory 4M");
    if done.code == Some(0) {
        eprintln!("skipped: /dev/kvm opens here");
        return;
    }
    check("run --backend kvm --memory 4M", 1, &["/dev/kvm", "os error", "--backend soft"]);
}

#[test]
fn help_goes_to_stdout_and_succeeds() {
    for arguments in ["--help", "run --help", "doctor --help", "--version"] {
        let done = premap(arguments);
        assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{arguments}");
        assert!(done.stdout.contains("premap"), "{arguments}: {}", done.stdout);
    }
    assert_eq!(premap("").code, Some(2));
}

/// The end of a pipe whose reader is gone already.
fn unheard() -> PipeWriter {
    let (_, writer) = pipe().expect("a pipe can be made");
    writer
}

#[test]
fn a_reader_who_goes_away_is_no_failure() {
    for arguments in [vec!["run", "--backend", "soft", "--memory", "4M"], vec!["run", "--help"]] {
        let done =
            Command::new(env!("CARGO_BIN_EXE_premap")).args(&arguments).stdout(unheard()).output().unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!((done.status.code(), stderr.as_ref()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn a_closed_stderr_is_no_panic() {
    for arguments in ["--memory=0", "--memory=1024T"] {
        let status =
            Command::new(env!("CARGO_BIN_EXE_premap")).args(["run", arguments]).stderr(unheard()).status();
        assert_eq!(status.unwrap().code(), Some(2), "{arguments}");
    }
}
