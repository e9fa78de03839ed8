//! Compares the software KVM with the `/dev/kvm` at hand, script by script.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use conformance::{reach, script};
use premap_guest::Soft;
use premap_softkvm::Profile;

/// Runs random scripts on the software KVM and on /dev/kvm, and shows where they differ
#[derive(Debug, Parser)]
struct Options {
    /// The release that the software KVM follows
    #[arg(long, default_value = "6.12")]
    profile: Profile,
    /// How many scripts to run
    #[arg(long, default_value_t = 200)]
    cases: u64,
    /// What the scripts are made from
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let Options { profile, cases, seed } = Options::parse();
    let Some(linux) = reach::linux_with_pre_fault() else {
        eprintln!("error: there is no /dev/kvm with pre-faulting here to compare with");
        return ExitCode::FAILURE;
    };
    let mut shown = 0;
    let summary = script::compare_all(&Soft::new(profile), &linux, seed, cases, |summary| {
        for difference in &summary.differences[shown..] {
            println!("{difference}\n");
        }
        shown = summary.differences.len();
        if summary.scripts % 100 == 0 {
            eprintln!("{} of {cases} scenarios, {shown} differences", summary.scripts);
        }
    });
    let (scripts, operations) = (summary.scripts, summary.operations);
    println!("{scripts} scenarios, {operations} operations, {shown} differences (seed {seed})");
    let _ = std::io::stdout().flush();
    if shown == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
