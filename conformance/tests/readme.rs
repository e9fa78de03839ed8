//! The README's tables name what there is, and all of it.

use std::collections::BTreeSet;

const README: &str = include_str!("../README.md");
const LISTS: &str = include_str!("../src/lib.rs");
/// Where the other tests are that the README names.
const OTHERS: [&str; 5] = [
    include_str!("linux.rs"),
    include_str!("../../crates/premap-softkvm/tests/pre_fault.rs"),
    include_str!("../../crates/premap-softkvm/tests/roles.rs"),
    include_str!("../../crates/premap-softkvm/tests/shadow_mmu.rs"),
    include_str!("../../crates/premap-softkvm/src/signals.rs"),
];

/// The scenarios in the macros' lists, which have a line `room: name,` each.
fn scenarios() -> BTreeSet<&'static str> {
    let names = LISTS.lines().filter_map(|line| line.trim().split_once(": ")?.1.strip_suffix(','));
    names.filter(|name| is_name(name)).collect()
}

/// What the README has between backticks and looks like a test's name.
fn named() -> BTreeSet<&'static str> {
    README
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| is_name(name) && name.matches('_').count() > 1)
        .collect()
}

fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

#[test]
fn each_scenario_has_its_place_in_the_readme_and_each_name_there_is_a_test() {
    let (scenarios, named) = (scenarios(), named());
    assert!(scenarios.len() > 30, "the lists of scenarios are not understood any more: {scenarios:?}");
    let unnamed: Vec<_> = scenarios.difference(&named).collect();
    assert!(unnamed.is_empty(), "not in the README: {unnamed:?}");
    let unknown: Vec<_> = named
        .difference(&scenarios)
        .filter(|name| !OTHERS.iter().any(|file| file.contains(&format!("fn {name}("))))
        .collect();
    assert!(unknown.is_empty(), "named in the README, and nowhere: {unknown:?}");
}
