//! `premap td measure` on the clean example of premap-tdx's tests, and on halves and wrecks of it.

mod command;

use std::io::Read;
use std::path::PathBuf;

use command::{Done, premap};
use serde_json::Value;

const MRTD: &str =
    "6e540be4917f24f74cc3292b59803d06dc7c38eb4a3c1fd6be9c735ba74bb7a23e25f98da94779d17508b243e4fb582b";

/// The clean example, unpacked.
fn firmware() -> Vec<u8> {
    let packed = include_bytes!("../../premap-tdx/tests/data/gce_clean_example_2m.fd.gz");
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut image).expect("it is a gzip file");
    image
}

/// A file among the test's own, which no other test touches.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn file(name: &str, bytes: &[u8]) -> String {
    let path = path(name);
    std::fs::write(&path, bytes).expect("the folder for tests can be written");
    path.to_str().expect("a path of this project is text").to_owned()
}

fn measure(file: &str, flags: &str) -> Done {
    premap(&format!("td measure {file} {flags}"))
}

fn json(done: &Done) -> Value {
    serde_json::from_str(&done.stdout).expect("stdout is JSON")
}

#[test]
fn json_has_the_value_its_counts_and_its_sections() {
    let done = measure(&file("json.fd", &firmware()), "--json --memory 2G");
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    let json = json(&done);
    assert_eq!((json["mrtd"].as_str(), json["order"].as_str()), (Some(MRTD), Some("page")));
    assert_eq!((json["adds"].as_u64(), json["extends"].as_u64()), (Some(538), Some(7680)));
    let bfv =
        serde_json::json!({"type": "BFV", "gpa": 0xffe2_0000_u32, "bytes": 0x1e_0000, "measured": true});
    assert_eq!((&json["sections"][0], json["sections"].as_array().map(Vec::len)), (&bfv, Some(6)));
    let hob = json["td_hob_sha384"].as_str().unwrap_or_default();
    assert!(hob.starts_with("0b8772e5b0b41b83"), "{hob}");
}

#[test]
fn an_expected_value_is_found_in_whichever_order_gives_it() {
    let file = file("expect.fd", &firmware());
    let region = json(&measure(&file, "--json --order region"));
    let region = region["mrtd"].as_str().expect("a value");
    assert_ne!(region, MRTD);
    for (flags, code, order, fits) in [
        (format!("--expect {MRTD}"), 0, "page", true),
        (format!("--expect {region}"), 0, "region", true),
        (format!("--expect {region} --order region"), 0, "region", true),
        (format!("--expect {region} --order page"), 1, "region", false),
    ] {
        let done = measure(&file, &format!("--json {flags}"));
        let expected = &json(&done)["expected"];
        assert_eq!((done.code, expected["fits"].as_bool()), (Some(code), Some(fits)), "{flags}");
        assert_eq!(expected["order"], order, "{flags}");
    }
    let done = measure(&file, &format!("--expect {region} --order page"));
    assert!(done.stdout.contains("but that of region order"), "{}", done.stdout);
    let done = measure(&file, &format!("--expect {}", "0".repeat(96)));
    assert_eq!(done.code, Some(1));
    assert!(done.stdout.contains("in no order") && done.stdout.contains("--events"), "{}", done.stdout);
}

#[test]
fn the_list_of_events_has_every_operation_and_ends_in_the_value() {
    let list = path("events");
    let done = measure(&file("listed.fd", &firmware()), &format!("--events {}", list.display()));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let list = std::fs::read_to_string(list).expect("the list was written");
    let lines = |start| list.lines().filter(|line: &&str| line.starts_with(start)).count();
    assert_eq!((lines("add "), lines("extend "), lines("digest "), lines("mrtd ")), (538, 7680, 5, 1));
    assert!(list.lines().next_back().is_some_and(|last| last.contains(MRTD)));
}

#[track_caller]
fn refused(flags: &str, code: i32, parts: &[&str]) {
    let done = premap(&format!("td measure {flags}"));
    assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    for part in parts {
        assert!(done.stderr.contains(part), "{part:?} is not in {:?}", done.stderr);
    }
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_line() {
    let whole = firmware();
    let good = file("good.fd", &whole);
    let cut = file("cut.fd", &whole[..0x1f_0000]);
    // The first section's RawDataSize, at entry + 4 behind the header of 16 bytes.
    let mut wreck = whole;
    wreck[0x110 + 20..0x110 + 24].copy_from_slice(&u32::MAX.to_le_bytes());
    let wreck = file("wreck.fd", &wreck);
    refused(&cut, 1, &["cut.fd", "footer", "0x1effd0"]);
    refused(&wreck, 1, &["wreck.fd", "section 0's RawDataSize", "0x124"]);
    refused(&format!("{good} --vars {cut}"), 1, &["good.fd", "0x1f0000", "VARS"]);
    refused(&format!("{good} --vars nowhere.fd"), 1, &["nowhere.fd", "No such file"]);
    refused("nowhere.fd", 1, &["nowhere.fd", "No such file"]);
    refused("/dev/zero", 1, &["/dev/zero", "longer than 64 MiB"]);
    refused(&format!("{good} --events /nowhere/list"), 1, &["/nowhere/list"]);
    refused(&format!("{good} --expect 12"), 2, &["--expect 12", "96"]);
    refused(&format!("{good} --memory 0"), 2, &["--memory 0", "2G"]);
    refused(&format!("{good} --memory 4M"), 2, &["--memory 4M", "section", "2G"]);
    refused(&format!("{good} --order random"), 2, &["--order random", "page, region, auto"]);
}

#[test]
fn a_code_file_alone_says_how_to_give_the_other_half() {
    // The example's metadata lie in what would be VARS; an installed image has them in CODE.
    let (code, vars) = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd");
    let old = ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd");
    let (code, vars) = if std::path::Path::new(old.0).exists() { old } else { (code, vars) };
    if !std::path::Path::new(code).exists() {
        assert!(std::env::var_os("PREMAP_REQUIRE_LAB").is_none_or(|value| value != "1"), "no {code}");
        eprintln!("skipped: no {code}; the package ovmf has it");
        return;
    }
    refused(code, 1, &["--vars", code, "split CODE file"]);
    assert_eq!(measure(code, &format!("--vars {vars}")).code, Some(0));
}

#[test]
fn a_td_runs_with_the_measured_value_and_no_exit_where_memory_is_mapped_ahead() {
    let file = file("run.fd", &firmware());
    let done = premap(&format!("td run {file} --memory 64M --profile proposal,combined,7.2 --json"));
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
    let json = json(&done);
    let tds = json.as_array().expect("one for each profile");
    let names: Vec<_> = tds.iter().map(|td| td["profile"].as_str().unwrap_or_default()).collect();
    assert_eq!(names, ["proposal", "combined", "7.2"]);
    // All of RAM but what the firmware has in it.
    let pages = (64 << 20) / 4096 - 26;
    for (td, exits) in tds.iter().zip([0, pages, 0]) {
        assert_eq!(td["mrtd"].as_str(), Some(MRTD));
        assert_eq!(td["accept"]["pages"].as_u64(), Some(pages));
        assert_eq!(td["accept"]["exits"].as_u64(), Some(exits), "{}", td["profile"]);
        assert_eq!(td["demand_exits"].as_u64(), Some(pages));
        let calls = &td["seamcalls"];
        let counts = ["TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND", "TDH.MEM.PAGE.AUG", "TDH.MR.FINALIZE"];
        assert_eq!(counts.map(|call| calls[call].as_u64()), [Some(538), Some(7680), Some(pages), Some(1)]);
    }
    let phases = |td: &Value| -> Vec<_> {
        let phases = td["phases"].as_array().expect("phases").iter();
        phases.map(|phase| (phase["name"].to_string(), phase["bytes"].as_u64().unwrap_or(0) / 4096)).collect()
    };
    let expected = |reserved, rest| {
        [("init_vcpus", 0), ("reserve", reserved), ("add", 538), ("finalize", 0), ("map_rest", rest)]
            .map(|(name, pages)| (format!("{name:?}"), pages))
    };
    assert_eq!(phases(&tds[0]), expected(538, pages));
    assert_eq!(phases(&tds[1]), expected(0, 0));
    assert_eq!(phases(&tds[2]), expected(0, pages));
}

#[test]
fn without_mapping_ahead_each_page_costs_an_exit() {
    let file = file("demand.fd", &firmware());
    let done = premap(&format!("td run {file} --memory 16M --vcpus 1 --no-premap --json"));
    let json = json(&done);
    assert_eq!(json["accept"]["exits"], json["demand_exits"]);
    assert!(json["demand_exits"].as_u64() > Some(4000));
    let text = premap(&format!("td run {file} --memory 16M --vcpus 1"));
    assert!(text.stdout.contains("0 exits") && text.stdout.contains(MRTD), "{}", text.stdout);
}

#[test]
fn rounds_of_a_td_are_told_by_median_and_range_and_one_as_what_it_is() {
    let file = file("rounds.fd", &firmware());
    let run = format!("td run {file} --memory 16M --profile proposal,6.16");
    let json = json(&premap(&format!("{run} --repeat 3 --json")));
    for td in json.as_array().expect("one for each profile") {
        let samples = td["samples"].as_array().expect("samples");
        assert_eq!((td["repeat"].as_u64(), samples.len()), (Some(3), 3));
        for figure in ["/accept/ns", "/accept/exits", "/phases/2/ns"] {
            let mut values: Vec<_> = samples.iter().filter_map(|one| one.pointer(figure)?.as_u64()).collect();
            values.sort_unstable();
            assert_eq!(td.pointer(figure).and_then(Value::as_u64), values.get(1).copied(), "{figure}");
        }
    }
    let text = |flags: &str| premap(&format!("{run} {flags}")).stdout.replace('\n', " ");
    assert!(text("").contains("one sample, whose spread is unknown"));
    assert!(text("--repeat 2").contains("medians of 2 rounds"));
    refused_run(&file, "--repeat 0", "1 to 1000");
}

#[track_caller]
fn refused_run(file: &str, flags: &str, expected: &str) {
    let done = premap(&format!("td run {file} {flags}"));
    assert_eq!((done.code, done.stdout.as_str()), (Some(2), ""), "{}", done.stderr);
    assert!(done.stderr.contains(flags) && done.stderr.contains(expected), "{}", done.stderr);
}

#[test]
fn a_td_that_can_t_run_is_one_line() {
    let file = file("bad.fd", &firmware());
    let check = |flags: &str, code, expected: &str| {
        let done = premap(&format!("td run {file} {flags}"));
        assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""), "{flags}");
        assert!(
            done.stderr.contains(expected) && done.stderr.lines().count() == 1,
            "{flags}: {}",
            done.stderr
        );
    };
    check("--profile 6.12", 2, "--profile 6.12: no such profile with TDX");
    check("--memory 0", 2, "--memory 0: no memory at all");
    check("--memory 1M", 2, "--memory 1M: ");
    check("--vcpus 0", 2, "--vcpus 0");
    let done = premap("td run /nonexistent.fd");
    assert_eq!((done.code, done.stderr.lines().count()), (Some(1), 1));
}
