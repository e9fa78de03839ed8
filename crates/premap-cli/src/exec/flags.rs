//! The flags of `premap exec`.

use std::ffi::{OsStr, OsString};
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use premap::seccomp::{Mode, Thread, list, rules};
use premap_exec_settings as settings;

use crate::options::pages;
use crate::size::{Size, duration};

/// Flags of `premap exec`.
#[derive(Clone, Debug, Args)]
#[command(after_help = after_help())]
pub(crate) struct Exec {
    /// How the memory is mapped before the guest runs
    #[arg(long, value_enum, default_value_t)]
    strategy: Strategy,
    /// How much is mapped by one call
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = pages, allow_negative_numbers = true)]
    chunk: Size,
    /// How long mapping may hold the guest back, as 500ms or 2s; the rest is left to the guest's faults
    #[arg(long, value_name = "TIME", value_parser = duration, allow_negative_numbers = true)]
    deadline: Option<Duration>,
    /// How much of the host's memory mapping ahead may take [default: the whole guest where the host can hold it, else
    /// nothing]
    #[arg(long, value_name = "SIZE", value_parser = pages, allow_negative_numbers = true)]
    limit: Option<Size>,
    /// Threads that make memory present on the host, beside one for each vCPU at hand
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    host_threads: Option<u16>,
    /// For how long after the guest's start memory is mapped again when the VMM has changed its slots, as 90s, 5m or 1h;
    /// memory that is plugged later takes the guest's own faults
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = duration, allow_negative_numbers = true)]
    follow: Duration,
    /// What to do with memory that the guest may be given later (virtio-mem, DIMMs), or of which that can't be told
    #[arg(long, value_enum, default_value_t)]
    hotplug_pools: HotplugPools,
    /// What to do when the VMM is confined by seccomp
    #[arg(long, value_enum, default_value_t)]
    seccomp: Seccomp,
    /// Write what was done as JSON, an object a line, to this file or, as fd:3, to a descriptor
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().try_map(report))]
    report: Option<settings::Report>,
    /// Tell of each run on stderr, and not only of what failed
    #[arg(long)]
    verbose: bool,
    /// The VMM and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "VMM")]
    command: Vec<OsString>,
}

/// What is mapped ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Strategy {
    /// Nothing; only count the guest's faults
    None,
    /// KVM_PRE_FAULT_MEMORY alone
    SecondOnly,
    /// The host's side alone
    HostOnly,
    /// The host's side, then KVM_PRE_FAULT_MEMORY
    #[default]
    TwoStage,
}

/// What is done with memory that the guest may be given later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum HotplugPools {
    /// Leave it to the guest's own faults
    #[default]
    Leave,
    /// Map it like the guest's other memory
    Map,
}

/// What is done under a seccomp filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Seccomp {
    /// Map nothing, and say what the filter would have to allow
    #[default]
    StepAside,
    /// Go on: the filter allows it
    Trust,
}

impl Exec {
    /// The VMM's name as given, and its arguments.
    pub(super) fn command(&self) -> (&OsStr, &[OsString]) {
        // clap has seen to it that there is one.
        self.command
            .split_first()
            .map_or((OsStr::new(""), &[]), |(name, arguments)| (name.as_os_str(), arguments))
    }

    /// What the library is told.
    pub(super) fn settings(&self) -> settings::Settings {
        settings::Settings {
            strategy: match self.strategy {
                Strategy::None => settings::Strategy::None,
                Strategy::SecondOnly => settings::Strategy::SecondOnly,
                Strategy::HostOnly => settings::Strategy::HostOnly,
                Strategy::TwoStage => settings::Strategy::TwoStage,
            },
            chunk: Some(self.chunk.0),
            deadline_ns: self.deadline.map(nanoseconds),
            limit: self.limit.map(|size| size.0),
            host_threads: self.host_threads.map(usize::from),
            follow_ns: nanoseconds(self.follow),
            hotplug_pools: match self.hotplug_pools {
                HotplugPools::Leave => settings::HotplugPools::Leave,
                HotplugPools::Map => settings::HotplugPools::Map,
            },
            seccomp: match self.seccomp {
                Seccomp::StepAside => settings::Seccomp::StepAside,
                Seccomp::Trust => settings::Seccomp::Trust,
            },
            report: self.report.clone(),
            voice: if self.verbose { settings::Voice::Everything } else { settings::Voice::Failures },
            // For the one who becomes the VMM to say.
            process: None,
        }
    }
}

fn after_help() -> String {
    let [threads, all] = [&[Mode::Exec][..], &[Mode::ExecStart, Mode::Exec]].map(rules);
    let own: Vec<_> = threads.into_iter().filter(|rule| rule.thread == Thread::Caller).collect();
    format!(
        "The exit code is the VMM's own; 1 where it can't be run, 2 for bad use.\n\n\
         A VMM that lays seccomp filters on its own threads once it has opened /dev/kvm must allow {} there. One that is \
         confined as a whole before, and run with --seccomp trust, must allow {}.",
        list(&own),
        list(&all)
    )
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The value of `--report`. A path is whatever its owner made it.
fn report(value: OsString) -> Result<settings::Report, String> {
    match value.to_str().map(|text| (text, text.strip_prefix("fd:"))) {
        Some((_, Some(number))) => match number.parse() {
            Ok(number) if number >= 0 => Ok(settings::Report::Descriptor(number)),
            _ => Err("no descriptor; give one that the VMM inherits, as fd:3".to_owned()),
        },
        Some(("", _)) => Err("no file; give a path, or a descriptor as fd:3".to_owned()),
        _ => Ok(settings::Report::File(value.into())),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::{Command, Options};

    fn parse(text: &str) -> Exec {
        match Options::try_parse_from(text.split(' ')).unwrap().command {
            Command::Exec(exec) => exec,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_flags_the_library_gets_its_own_defaults() {
        let exec = parse("premap exec -- qemu -m 256M --strategy x");
        assert_eq!(exec.command().0, "qemu");
        assert_eq!(exec.command().1, ["-m", "256M", "--strategy", "x"]);
        let expected = settings::Settings { chunk: Some(16 << 20), ..Default::default() };
        assert_eq!(exec.settings(), expected);
    }

    #[test]
    fn every_flag_reaches_the_library() {
        let exec = parse(
            "premap exec --strategy host-only --chunk 2M --deadline 1ms --limit 1G --host-threads 3 --follow 2h \
             --seccomp trust --hotplug-pools map --report fd:7 --verbose vmm -x"
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_str(),
        );
        assert_eq!(exec.command().0, "vmm");
        let expected = settings::Settings {
            strategy: settings::Strategy::HostOnly,
            chunk: Some(2 << 20),
            deadline_ns: Some(1_000_000),
            limit: Some(1 << 30),
            host_threads: Some(3),
            follow_ns: 7_200_000_000_000,
            hotplug_pools: settings::HotplugPools::Map,
            seccomp: settings::Seccomp::Trust,
            report: Some(settings::Report::Descriptor(7)),
            voice: settings::Voice::Everything,
            process: None,
        };
        assert_eq!(exec.settings(), expected);
    }

    #[test]
    fn the_help_names_what_a_filter_must_allow() {
        let help = Options::try_parse_from(["premap", "exec", "--help"]).unwrap_err().to_string();
        let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(&list(&rules(&[Mode::ExecStart, Mode::Exec]))), "{help}");
        assert!(words.contains("must allow futex, "), "{help}");
    }

    #[test]
    fn a_report_goes_to_a_file_or_a_descriptor() {
        assert_eq!(report("a:b".into()), Ok(settings::Report::File("a:b".into())));
        for text in ["fd:", "fd:-1", "fd:x", ""] {
            assert!(report(text.into()).is_err(), "{text}");
        }
    }
}
