//! How the command fails: one line on stderr that names the value and the remedy, and an exit code.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// The exit code of bad use; a failure's is 1.
const BAD_USE: u8 = 2;

/// Says something on stderr. Where nobody can hear it, the exit code has to do.
pub(crate) fn tell(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "premap: {line}");
}

/// A flag's value that can't be served, with its remedy.
#[derive(Debug)]
pub(crate) struct BadUse(pub(crate) String);

impl std::fmt::Display for BadUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for BadUse {}

/// Tells an error in one line, and gives the exit code. A reader who has gone away is no failure.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let gone = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(gone) {
        return ExitCode::SUCCESS;
    }
    tell(format_args!("{}", one_line(&told(error))));
    if error.is::<BadUse>() { ExitCode::from(BAD_USE) } else { ExitCode::FAILURE }
}

/// Tells what clap has to say: help as it is, an error in one line.
pub(crate) fn report_usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader who has gone away has seen enough.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(BAD_USE)
        }
        _ => {
            tell(format_args!("{}", usage_line(error)));
            ExitCode::from(BAD_USE)
        }
    }
}

fn usage_line(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    // clap names a flag with its placeholder, `--memory <SIZE>`.
    let usage = context(ContextKind::InvalidArg);
    let flag = usage.as_deref().and_then(|flag| flag.split(' ').next());
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    match (error.kind(), flag) {
        (ErrorKind::ValueValidation, Some(flag)) => {
            let why = error.source().map_or_else(|| "not a value for it".to_owned(), ToString::to_string);
            format!("{flag} {value}: {why}")
        }
        (ErrorKind::InvalidValue, Some(flag)) => {
            let valid = context(ContextKind::ValidValue).unwrap_or_default();
            match (value.as_str(), valid.as_str()) {
                ("", "") => format!("{flag}: needs a value; write {}", usage.as_deref().unwrap_or(flag)),
                ("", valid) => format!("{flag}: needs a value; give one of {valid}"),
                (value, valid) => format!("{flag} {value}: no such choice; give one of {valid}"),
            }
        }
        (ErrorKind::UnknownArgument, Some(flag)) => {
            let near = context(ContextKind::SuggestedArg).map(|near| format!("did you mean {near}?"));
            format!("{flag}: no such flag; {}", near.unwrap_or_else(|| "see --help".to_owned()))
        }
        (ErrorKind::MissingRequiredArgument, Some(flag)) => format!("{flag} is missing; see --help"),
        (ErrorKind::ArgumentConflict, Some(flag)) => format!("{flag}: given twice; give it once"),
        _ => {
            // Only clap's first line: what follows is usage and tips.
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            format!("{}; see --help", line.trim_start_matches("error: "))
        }
    }
}

/// The error and its causes, but for what has been said: many an error's own words end in its cause's.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.ends_with(&cause) => text,
        said => format!("{said}: {cause}"),
    })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::options::Options;

    #[track_caller]
    fn check(arguments: &[&str], expected: &str) {
        let error = Options::try_parse_from(["premap"].iter().chain(arguments)).unwrap_err();
        assert_eq!(usage_line(&error), expected);
    }

    #[test]
    fn a_cause_that_an_error_s_own_words_end_in_is_told_once() {
        let cause = || anyhow::anyhow!("no such file");
        assert_eq!(
            told(&cause().context("opening it: no such file").context("--out x")),
            "--out x: opening it: no such file"
        );
        assert_eq!(told(&cause().context("opening it")), "opening it: no such file");
    }

    #[test]
    fn wrong_use_is_one_line_with_value_and_remedy() {
        check(&["run", "--memory", "0"], "--memory 0: nothing to map; give 4K or more, as 512M");
        check(
            &["run", "--memory", "3"],
            "--memory 3: not a multiple of the page size, 4 KiB; give 4K, 2M or 512M",
        );
        check(
            &["run", "--backing", "nvme"],
            "--backing nvme: no such choice; give one of anon, thp, memfd, hugetlb, file",
        );
        check(
            &["run", "--memory", "-5"],
            "--memory -5: not a size; write bytes, or K, M, G or T after a whole number, as 512M or 4GiB",
        );
        check(&["run", "--memory"], "--memory: needs a value; write --memory <SIZE>");
        check(&["run", "--touch"], "--touch: needs a value; give one of write, read");
        check(&["run", "--vcpus", "0"], "--vcpus 0: not a number of vCPUs; give 1 to 1024");
        check(
            &["run", "--deadline", "5"],
            "--deadline 5: not a time; write a number and us, ms, s, m or h after it, as 500ms or 2s",
        );
        check(&["run", "--memry", "1"], "--memry: no such flag; did you mean --memory?");
        check(&["run", "--json", "--json"], "--json: given twice; give it once");
        check(&["td", "measure"], "<FILE> is missing; see --help");
        check(&["walk"], "unrecognized subcommand 'walk'; see --help");
        check(&["run", "5"], "5: no such flag; see --help");
    }
}
