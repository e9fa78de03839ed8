//! Compares the software KVM with the `/dev/kvm` at hand, script by script.

use std::io::Write;
use std::num::NonZeroUsize;
use std::process::ExitCode;

use clap::Parser;
use conformance::known_differences::{KNOWN, Known};
use conformance::reach;
use conformance::script::{self, Among, Difference, Scripts, Summary};
use premap_guest::{Kernel, Soft, VmType};
use premap_softkvm::{Profile, SoftConfig};

/// Keeps two processors busy where the half of a script's time is spent waiting.
const AT_A_TIME: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// Runs random scripts on the software KVM and on /dev/kvm, and shows where they differ
#[derive(Debug, Parser)]
struct Options {
    /// The release that the software KVM follows; unless given, the newest that is no newer than this kernel
    #[arg(long)]
    profile: Option<Profile>,
    /// How many scripts to run
    #[arg(long, default_value_t = 200)]
    cases: u64,
    /// What the scripts are made from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this one of the scripts alone
    #[arg(long, value_name = "NUMBER", conflicts_with = "cases")]
    only: Option<u64>,
    /// How many scripts at a time
    #[arg(long, value_name = "N", default_value_t = AT_A_TIME)]
    jobs: NonZeroUsize,
}

fn main() -> ExitCode {
    let Options { profile, cases, seed, only, jobs } = Options::parse();
    let Some((linux, found)) = reach::linux().filter(|(_, found)| found.is_supported()) else {
        eprintln!("error: there is no /dev/kvm with pre-faulting here to compare with");
        return ExitCode::FAILURE;
    };
    let release = linux.release();
    let profile = profile.unwrap_or_else(|| following(&release));
    eprintln!("software KVM as {profile} against Linux {release}");
    let soft = Soft::with_config(SoftConfig { profile, tdp: reach::tdp_of(found), ..SoftConfig::default() });
    let protected = linux.has(VmType::SoftwareProtected);
    let among = if protected { Among::EveryType } else { Among::Default };
    let numbers = only.map_or(0..cases, |only| only..only.saturating_add(1));
    let scripts = Scripts { among, seed, numbers: numbers.clone(), at_a_time: jobs };
    let known = Known { list: KNOWN, release: &release };
    let mut shown = 0;
    let summary = script::compare_all(&soft, &linux, scripts, known, |summary| {
        for difference in &summary.differences[shown..] {
            println!("{difference}\n");
        }
        shown = summary.differences.len();
        if summary.scripts % 100 == 0 {
            eprintln!(
                "{} of {} scenarios, {shown} differences",
                summary.scripts,
                numbers.end - numbers.start
            );
        }
    });
    let Summary { scripts, operations, differences, known } = summary;
    for (reason, Difference { made_by: (_, number), .. }) in &known {
        println!("known, in script {number}: {reason}");
    }
    let beyond = if known.is_empty() { String::new() } else { format!(" beyond {} known ones", known.len()) };
    println!(
        "{scripts} scenarios, {operations} operations, {} differences{beyond} (seed {seed})",
        differences.len()
    );
    let _ = std::io::stdout().flush();
    if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The newest profile that is no newer than a kernel's release; the oldest where all are newer.
fn following(release: &str) -> Profile {
    let known = Profile::RELEASES
        .into_iter()
        .filter(|profile| reach::version(profile.name()) <= reach::version(release));
    known.max_by_key(|profile| reach::version(profile.name())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(release: &str, profile: &str) {
        assert_eq!(following(release).name(), profile);
    }

    #[test]
    fn a_kernel_is_followed_by_the_newest_profile_that_is_not_newer() {
        check("6.12.117+deb13-cloud-amd64", "6.12");
        check("6.15.1", "6.12");
        check("6.18.44", "6.16");
        check("7.2.3-cloud-amd64", "7.2");
        check("8.0", "7.2");
    }
}
