//! `premap doctor` on whatever machine the tests run on.

mod command;

use command::premap;
use serde_json::Value;

const CHECKS: [&str; 9] = [
    "kernel release",
    "/dev/kvm",
    "two-stage trial",
    "second-stage paging",
    "transparent huge pages",
    "hugetlb pages",
    "memory limits",
    "hugetlb limits",
    "userfaultfd",
];

#[test]
fn the_exit_code_is_the_verdict_and_json_tells_why() {
    let done = premap("doctor --json");
    let verdict: Value = serde_json::from_str(&done.stdout).unwrap();
    let works = verdict["works"].as_bool().unwrap();
    assert_eq!(done.code, Some(i32::from(!works)), "{}", done.stderr);
    let checks = verdict["checks"].as_array().unwrap();
    for name in CHECKS {
        let check = checks.iter().find(|check| check["check"] == name);
        let check = check.unwrap_or_else(|| panic!("there is no check {name} in {}", done.stdout));
        assert!(["good", "limited", "missing"].contains(&check["status"].as_str().unwrap()), "{check}");
        assert!(!check["result"].as_str().unwrap().is_empty(), "{check}");
    }
    let trial = checks.iter().find(|check| check["check"] == "two-stage trial").unwrap();
    assert_eq!(trial["status"] == "good", works);
}

#[test]
fn the_table_has_every_check_and_a_verdict() {
    let done = premap("doctor");
    assert!(matches!(done.code, Some(0 | 1)), "{:?} {}", done.code, done.stderr);
    for name in CHECKS {
        assert!(done.stdout.contains(name), "{name} is not in\n{}", done.stdout);
    }
    let verdict = if done.code == Some(0) { "works on this host" } else { "doesn't work on this host" };
    assert!(done.stdout.contains(verdict), "{}", done.stdout);
}
