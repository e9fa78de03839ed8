//! How fast the page table is, beside its peers and beside floors that do the bare stores.
//!
//! All subjects take turns within a round, so that drift of the machine hits all alike; each figure is the minimum over the
//! rounds, and its spread the distance from there to the median. None of the peers is concurrent: they are measured on one
//! thread, without any lock.

mod floors;
mod harness;
mod peers;
mod pools;
mod subject;

use std::process::ExitCode;

use harness::{Sink, World};

/// A figure that is asked for, and what it is compared with.
enum Bar {
    AtMost(&'static str, usize, f64),
    /// premap's figure divided by the other's is at most this.
    Within(&'static str, &'static str, f64),
    /// The other's figure divided by premap's is at least this.
    Faster(&'static str, &'static str, f64),
    /// Premap on one thread divided by premap on two is at least this.
    Scales(&'static str, f64),
}

const BARS: &[Bar] = &[
    Bar::AtMost("range_map", 1, 0.6),
    Bar::Faster("range_map", "page_table_multiarch", 10.0),
    Bar::AtMost("cursor_map", 1, 1.5),
    Bar::Within("random_map", "floor: 4 levels, lock-free", 1.15),
    Bar::AtMost("range_query", 1, 0.5),
    Bar::Scales("range_map_blocks", 1.7),
    Bar::Scales("range_map_interleaved", 1.3),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let rounds = arguments
        .iter()
        .find_map(|argument| argument.strip_prefix("--rounds="))
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(if cfg!(debug_assertions) { 1 } else { 15 });
    let only = arguments.iter().find_map(|argument| argument.strip_prefix("--only=").map(str::to_owned));
    let mut world = World::new();
    let mut sink = Sink::default();
    for round in 0..rounds {
        if !json {
            eprintln!("round {} of {rounds}", round + 1);
        }
        for (name, run) in subject::RUNS.iter().chain(peers::RUNS).chain(floors::RUNS) {
            if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
                continue;
            }
            world.wait_until_idle();
            run(&mut world, &mut sink);
            world.arena.reset();
        }
    }
    if only.is_some() {
        sink.print();
        return ExitCode::SUCCESS;
    }
    let mut rows = sink.rows();
    let figure = |bench: &str, subject: &str, threads: usize| {
        sink.minimum(bench, subject, threads).expect("every bar names what was measured")
    };
    let mut met = true;
    for bar in BARS {
        let (bench, subject, threads, value, holds, asked) = match *bar {
            Bar::AtMost(bench, threads, most) => {
                let value = figure(bench, "premap", threads);
                met &= value <= most;
                if !json {
                    println!("{bench}: {value:.3} ns, asked for at most {most}");
                }
                continue;
            }
            Bar::Within(bench, other, most) => {
                let value = figure(bench, "premap", 1) / figure(bench, other, 1);
                (bench, format!("premap / {other}"), 1, value, value <= most, format!("at most {most}"))
            }
            Bar::Faster(bench, other, least) => {
                let value = figure(bench, other, 1) / figure(bench, "premap", 1);
                (bench, format!("{other} / premap"), 1, value, value >= least, format!("at least {least}"))
            }
            Bar::Scales(bench, least) => {
                let value = figure(bench, "premap", 1) / figure(bench, "premap", 2);
                let subject = "premap, one thread / two".to_owned();
                (bench, subject, 2, value, value >= least, format!("at least {least}"))
            }
        };
        met &= holds;
        if !json {
            println!("{bench}: {subject} = {value:.2}, asked for {asked}");
        }
        rows.push(harness::row(bench, &subject, threads, value, "x", 0.0));
    }
    // Every other ratio.
    for (bench, subject, threads, value) in sink.ratios() {
        rows.push(harness::row(&bench, &subject, threads, value, "x", 0.0));
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    } else {
        sink.print();
        println!("The peers are not concurrent: they take no lock and no atomic, and run on one thread.");
        println!("{}", if met { "Every bar is met." } else { "A bar is missed." });
    }
    ExitCode::SUCCESS
}
