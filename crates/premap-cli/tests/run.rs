//! `premap run` on the software KVM: what it counts, and the shape of what it prints.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod command;

use command::premap;
use serde_json::{Value, json};

const PAGES: u64 = 1_024;

/// The rows of a run of 4 MiB on the software KVM with further flags.
#[track_caller]
fn rows(flags: &str) -> Vec<Value> {
    let done = premap(&format!("run --backend soft --memory 4M --json {flags}"));
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{}", done.stdout);
    serde_json::from_str(&done.stdout).unwrap()
}

#[track_caller]
fn row<'a>(rows: &'a [Value], strategy: &str) -> &'a Value {
    rows.iter().find(|row| row["strategy"] == strategy).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn json_has_an_object_a_strategy_with_every_field() {
    let rows = rows("");
    let strategies: Vec<_> = rows.iter().map(|row| row["strategy"].as_str().unwrap()).collect();
    assert_eq!(strategies, ["demand", "second-only", "host-only", "two-stage"]);
    for row in &rows {
        let mut fields = keys(row);
        fields.sort_unstable();
        assert_eq!(
            fields,
            [
                "backend",
                "backing",
                "guest",
                "host",
                "kernel",
                "mapped",
                "memory_bytes",
                "pages",
                "repeat",
                "samples",
                "second",
                "strategy",
                "total_ns",
                "vcpus"
            ]
        );
        for (part, fields) in [
            (
                "host",
                vec!["abandoned", "asked", "bytes", "calls", "failed", "mapped", "ns", "reason", "skipped"],
            ),
            (
                "second",
                vec![
                    "abandoned",
                    "asked",
                    "bytes",
                    "calls",
                    "failed",
                    "mapped",
                    "ns",
                    "reason",
                    "skipped",
                    "supported",
                ],
            ),
            ("guest", vec!["exits", "faults", "ns"]),
            ("mapped", vec!["pages_1g", "pages_2m", "pages_4k"]),
        ] {
            let mut found = keys(&row[part]);
            found.sort_unstable();
            assert_eq!(found, fields, "{part}");
        }
        assert_eq!(row["backend"], "soft");
        assert_eq!(row["kernel"], "6.12");
        assert_eq!((&row["backing"], &row["vcpus"]), (&json!("anon"), &json!(1)));
        assert_eq!((&row["memory_bytes"], &row["pages"]), (&json!(PAGES * 4096), &json!(PAGES)));
        assert_eq!((&row["repeat"], row["samples"].as_array().map(Vec::len)), (&json!(1), Some(1)));
        for part in ["host", "second", "guest", "mapped", "total_ns"] {
            assert_eq!(row["samples"][0][part], row[part], "one sample is its own median");
        }
        let ns = |part: &str| row[part]["ns"].as_u64().unwrap();
        assert_eq!(row["total_ns"].as_u64().unwrap(), ns("host") + ns("second") + ns("guest"));
        assert!(ns("guest") > 0);
        assert_eq!((&row["second"]["supported"], &row["second"]["reason"]), (&json!(true), &json!(null)));
        assert_eq!(row["mapped"]["pages_4k"], PAGES);
    }
}

#[test]
fn strategies_cost_what_linux_makes_them_cost() {
    let rows = rows("");
    let counts = |strategy| {
        let row = row(&rows, strategy);
        let number = |value: &Value| value.as_u64().unwrap();
        (number(&row["guest"]["faults"]), number(&row["host"]["bytes"]), number(&row["second"]["bytes"]))
    };
    let bytes = PAGES * 4096;
    assert_eq!(counts("demand"), (PAGES, 0, 0));
    assert_eq!(counts("second-only"), (2 * PAGES, 0, bytes));
    assert_eq!(counts("host-only"), (PAGES, bytes, 0));
    assert_eq!(counts("two-stage"), (0, bytes, bytes));
}

#[test]
fn strategies_are_chosen_by_a_list_and_run_once_each() {
    let names = |flags: &str| -> Vec<_> {
        let rows = rows(&format!("--vcpus 2 --strategy {flags}"));
        rows.iter().map(|row| row["strategy"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("demand,background"), ["demand", "background"]);
    assert_eq!(names("two-stage,all"), ["two-stage", "demand", "second-only", "host-only"]);
    assert_eq!(names("all,background").len(), 5);
    let text = premap("run --backend soft --memory 4M --strategy demand,background").stdout;
    let background = text.lines().find(|line| line.starts_with(" background")).unwrap();
    assert!(background.contains('×'), "nothing is beside demand: {background}");
}

#[test]
fn rounds_are_told_by_median_and_range_and_one_sample_as_what_it_is() {
    let rows = rows("--strategy demand,background --repeat 4");
    for row in &rows {
        let samples = row["samples"].as_array().unwrap();
        assert_eq!((&row["repeat"], samples.len()), (&json!(4), 4));
        for figure in ["/total_ns", "/guest/ns", "/guest/faults", "/guest/exits", "/host/ns", "/second/ns"] {
            let mut values: Vec<_> =
                samples.iter().map(|sample| sample.pointer(figure).unwrap().as_u64().unwrap()).collect();
            values.sort_unstable();
            assert_eq!(row.pointer(figure).unwrap().as_u64(), Some(values[1]), "{figure} of {values:?}");
        }
    }
    let text =
        |flags: &str| premap(&format!("run --backend soft --memory 4M --strategy demand {flags}")).stdout;
    let unknown = "one sample, whose spread is unknown";
    assert!(text("").contains(unknown) && !text("--repeat 2").contains(unknown));
    assert!(text("--repeat 2").contains("medians of 2 rounds"));
}

#[test]
fn flags_choose_what_is_measured() {
    for flags in [
        "--strategy two-stage --order random --vcpus 3 --chunk 2M",
        "--strategy two-stage --backing memfd --touch read",
        "--strategy two-stage --backing thp --profile 7.2",
        "--strategy two-stage --backing file --vcpus 2",
    ] {
        let rows = rows(flags);
        let [row] = rows.as_slice() else { panic!("{flags}: {} rows", rows.len()) };
        assert_eq!(row["guest"]["faults"], 0, "{flags}");
        assert_eq!(row["second"]["bytes"], PAGES * 4096, "{flags}");
        let given = |flag: &str| flags.split(flag).nth(1).and_then(|rest| rest.split(' ').next());
        assert_eq!(row["backing"], given("--backing ").unwrap_or("anon"));
        assert_eq!(row["kernel"], given("--profile ").unwrap_or("6.12"));
        assert_eq!(row["vcpus"].to_string(), given("--vcpus ").unwrap_or("1"));
    }
}

#[test]
fn in_the_background_memory_is_mapped_while_the_guest_runs() {
    for flags in ["", "--vcpus 2 --order random --profile 7.2", "--chunk 64K --backing memfd"] {
        let rows = rows(&format!("--strategy background {flags}"));
        let [row] = rows.as_slice() else { panic!("{flags}: {} rows", rows.len()) };
        assert_eq!(
            (&row["host"]["bytes"], &row["second"]["bytes"]),
            (&json!(PAGES * 4096), &json!(PAGES * 4096))
        );
        assert_eq!(row["mapped"]["pages_4k"], PAGES, "{flags}");
        assert!(row["second"]["calls"].as_u64().unwrap() > 1, "{flags}: {row}");
        assert_eq!(row["total_ns"], row["guest"]["ns"], "mapping takes no time of its own");
    }
}

#[test]
fn what_a_deadline_leaves_is_left_to_faults() {
    let rows = rows("--strategy two-stage --deadline 1us");
    let [row] = rows.as_slice() else { panic!("{} rows", rows.len()) };
    let mapped = row["second"]["bytes"].as_u64().unwrap() / 4096;
    assert!(mapped < PAGES, "all {mapped} pages were mapped in a microsecond");
    assert_eq!(row["guest"]["faults"], PAGES - mapped);
    assert!(row["second"]["reason"].as_str().unwrap().contains("deadline"), "{row}");
}

#[test]
fn text_tells_a_newcomer_what_happened() {
    let done = premap("run --backend soft --memory 4M");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    for part in [
        "4 MiB of memory (anon)",
        "1,024 pages",
        "the software KVM, as Linux 6.12",
        "2,048 (2.00×)",
        "0 (0×)",
        "faults       touches",
        "took 0 faults instead of 1,024",
        "second-only is a trap",
    ] {
        assert!(done.stdout.contains(part), "{part:?} is not in\n{}", done.stdout);
    }
}

#[test]
fn auto_says_what_it_took_and_why() {
    let done = premap("run --memory 1M --strategy two-stage");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let lines: Vec<_> = done.stderr.lines().collect();
    let [line] = lines.as_slice() else { panic!("not one line: {}", done.stderr) };
    let soft = line.contains("on the software KVM, as Linux 6.12, since ");
    let kvm = line.contains("on /dev/kvm, Linux ") && line.ends_with("which can pre-fault");
    assert!(soft != kvm, "{line}");
}

#[test]
fn a_kvm_without_a_second_stage_does_the_host_stage_and_says_so() {
    let done = premap("run --backend kvm --memory 4M --json");
    if done.code != Some(0) {
        assert!(done.stderr.contains("/dev/kvm"), "{}", done.stderr);
        eprintln!("skipped: {}", done.stderr.trim());
        return;
    }
    let rows: Vec<Value> = serde_json::from_str(&done.stdout).unwrap();
    let two = row(&rows, "two-stage");
    assert_eq!(two["host"]["bytes"], PAGES * 4096);
    if two["second"]["supported"] == json!(false) {
        assert_eq!(two["second"]["bytes"], 0);
        assert!(two["second"]["reason"].as_str().unwrap().len() > 20, "{two}");
        let text = premap("run --backend kvm --memory 4M").stdout;
        assert!(text.contains("no second stage here"), "{text}");
    } else {
        assert!(two["guest"]["faults"].as_u64().unwrap() <= 16, "{two}");
    }
}
