//! Every byte is accounted for in every report: what was asked is what was mapped, skipped, failed or abandoned.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod command;

use std::io::Read;
use std::path::PathBuf;

use command::premap;
use serde_json::Value;

const FATES: [&str; 4] = ["mapped", "skipped", "failed", "abandoned"];

/// Sums and accounts of a report, wherever in it they are.
fn accounts(report: &Value) -> Vec<(u64, [u64; 4])> {
    let children: Vec<&Value> = match report {
        Value::Array(all) => all.iter().collect(),
        Value::Object(all) => all.values().collect(),
        _ => Vec::new(),
    };
    let mut found: Vec<_> = children.into_iter().flat_map(accounts).collect();
    if let Some(asked) = report.get("asked") {
        found.push((asked.as_u64().unwrap(), FATES.map(|fate| report[fate].as_u64().unwrap())));
    }
    found
}

/// The rows of the table of accounts in a text: all lines that end in five numbers.
fn rows(text: &str) -> Vec<(u64, [u64; 4])> {
    let row = |line: &str| {
        let words = line.split_whitespace().map(|word| word.replace(',', "").parse().ok());
        let mut numbers = words.rev().map_while(|number| number);
        let numbers: [u64; 5] = std::array::from_fn(|_| numbers.next().unwrap_or(u64::MAX));
        let [abandoned, failed, skipped, mapped, asked] = numbers;
        (!numbers.contains(&u64::MAX)).then_some((asked, [mapped, skipped, failed, abandoned]))
    };
    text.lines().filter_map(row).collect()
}

/// Runs the command for JSON and for text, whose accounts must be as many as said and add up, and gives the JSON's.
#[track_caller]
fn check(arguments: &str, in_json: usize, in_text: usize) -> Vec<(u64, [u64; 4])> {
    let done = premap(&format!("{arguments} --json"));
    let json = accounts(&serde_json::from_str(&done.stdout).unwrap());
    assert_eq!(done.code, Some(0), "{arguments}: {}", done.stderr);
    let text = rows(&premap(arguments).stdout);
    assert_eq!((json.len(), text.len()), (in_json, in_text), "{arguments}: {json:?} {text:?}");
    for (asked, fates) in json.iter().chain(&text) {
        assert_eq!(*asked, fates.iter().sum::<u64>(), "{arguments}: {fates:?}");
    }
    json
}

#[test]
fn each_stage_of_a_run_accounts_for_every_byte() {
    const ASKED: u64 = 4 << 20;
    // Two stages in a row, and in its one sample.
    for (flags, stages, fate) in [
        ("demand", 1, None),
        ("second-only", 1, Some(0)),
        ("host-only", 1, Some(0)),
        ("two-stage", 2, Some(0)),
        ("background --vcpus 2", 2, Some(0)),
        ("two-stage --budget 1M", 2, Some(3)),
        ("two-stage --deadline 1us", 2, Some(3)),
    ] {
        let run = format!("run --backend soft --memory 4M --strategy {flags}");
        let json = check(&run, 4, stages);
        assert!(json.iter().all(|(asked, _)| *asked == fate.map_or(0, |_| ASKED)), "{flags}: {json:?}");
        assert!(fate.is_none_or(|fate| json.iter().any(|(_, fates)| fates[fate] > 0)), "{flags}: {json:?}");
    }
    check("run --backend soft --memory 4M --repeat 3 --strategy all,background", 5 * 8, 7);
}

#[test]
fn a_stage_that_this_kvm_lacks_is_skipped_to_the_byte() {
    let done = premap("run --backend kvm --memory 4M --strategy two-stage --json");
    let unsupported = |rows: &Value| rows[0]["second"]["supported"] == false;
    if !serde_json::from_str(&done.stdout).is_ok_and(|rows| unsupported(&rows)) {
        eprintln!("skipped: there is no /dev/kvm without pre-faulting: {}", done.stderr.trim());
        return;
    }
    let json = check("run --backend kvm --memory 4M --strategy two-stage", 4, 2);
    assert!(json.iter().any(|(asked, fates)| fates[1] == *asked), "{json:?}");
}

#[test]
fn a_recording_accounts_for_all_memory_that_it_watched() {
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("accounts.premap");
    let json = check(&format!("record --backend soft --memory 4M --out {}", out.display()), 1, 1);
    assert_eq!(json, [(4 << 20, [4 << 20, 0, 0, 0])]);
}

#[test]
fn each_phase_of_a_td_that_maps_accounts_for_every_byte() {
    let packed = include_bytes!("../../premap-tdx/tests/data/gce_clean_example_2m.fd.gz");
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut image).unwrap();
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("accounts.fd");
    std::fs::write(&file, image).unwrap();
    let run = format!("td run {} --memory 16M", file.display());
    // Two phases of each profile, and of its one sample.
    let json = check(&format!("{run} --profile proposal,combined,7.2"), 12, 6);
    // By name, so `map_rest` comes first, and the samples last. The second profile maps nothing ahead.
    let own = json.chunks(4).flat_map(|profile| &profile[2..]);
    let fates = own.map(|(asked, fates)| fates.map(|bytes| bytes > 0 && bytes == *asked));
    let [mapped, skipped] = [[true, false, false, false], [false, true, false, false]];
    assert_eq!(fates.collect::<Vec<_>>(), [mapped, mapped, skipped, skipped, mapped, skipped], "{json:?}");
    check(&format!("{run} --no-premap"), 4, 2);
}
