//! `premap doctor`: what this host can do for pre-mapping, and what to change where it can't.
//!
//! What is read from the host and what it means are apart: meanings are pure functions of what was read. The verdict is
//! that of a real trial on a scratch VM, not of the probes.

mod check;
mod device;
mod limits;
mod memory;
mod paging;
mod release;
mod trial;
mod userfaultfd;

use std::io::{Write, stdout};
use std::process::ExitCode;

use anyhow::Context;
use premap_guest::Linux;

use crate::options;
use check::{Check, Verdict};

/// Examines the host and prints what was found.
pub(crate) fn run(options: options::Doctor) -> anyhow::Result<ExitCode> {
    let verdict = Verdict::of(examine());
    let text = if options.json { verdict.json()? } else { verdict.text() };
    stdout().lock().write_all(text.as_bytes()).context("writing to stdout")?;
    Ok(if verdict.works() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn examine() -> Vec<Check> {
    let mut checks = Vec::new();
    let uname = rustix::system::uname();
    checks.push(release::check(&uname.release().to_string_lossy()));
    let linux = Linux::open();
    checks.push(device::opened(linux.as_ref().map(|_| ())));
    if let Ok(linux) = &linux {
        checks.push(device::api_version(linux));
        checks.push(device::pre_fault(linux));
    }
    checks.push(trial::check(linux.as_ref().ok()));
    checks.push(paging::check(&paging::Modules::read()));
    if let Ok(linux) = &linux {
        checks.extend(device::private_memory(linux));
    }
    checks.push(memory::transparent_huge_pages());
    checks.push(memory::hugetlb());
    checks.extend(limits::checks());
    checks.push(userfaultfd::check());
    checks
}
