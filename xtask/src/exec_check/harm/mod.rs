//! The rows of harm: what a VMM does under `premap exec` where memory is scarce, not the guest's to use, or not memory, and
//! when it is told to pause or end meanwhile, beside what it does alone.
//!
//! A row is one [`Case`], run by `case.sh` in the lab on either side. Unlike the boots, the side without premap is without
//! premap altogether.

mod row;

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::shell;
use super::verdict::Side;
use crate::acceptance::ATTEMPTS;
use crate::lab::boot::{Boot, Job};
use crate::lab::note;

pub(super) use row::{Case, Row};

use row::Seen;

const SCRIPT: &str = include_str!("case.sh");
/// How long the script waits for any one thing.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long one side of a case may take. The script comes to its end long before.
const LIMIT: Duration = Duration::from_secs(900);

/// Runs one case on both sides; again where only time fell short, since other work on this machine takes time too.
///
/// # Errors
///
/// Why a side could not be measured.
pub(super) fn run(boot: &mut Boot, case: Case) -> Result<Row> {
    let mut attempt = 1;
    loop {
        let without = run_side(boot, case, Side::Without)?;
        let with = run_side(boot, case, Side::With)?;
        let row = Row::new(case, without, with);
        note!("{row}");
        if row.shortfall().is_none() || !case.is_timed() || attempt == ATTEMPTS {
            return Ok(row);
        }
        attempt += 1;
        note!("measuring again, attempt {attempt} of {ATTEMPTS}");
    }
}

fn run_side(boot: &mut Boot, case: Case, side: Side) -> Result<Seen> {
    let mut argv = shell(SCRIPT);
    let name = case.name();
    argv.extend(["case.sh", &name, side.word(), &PATIENCE.as_secs().to_string()].map(str::to_owned));
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let job = Job { argv, environment: Vec::new(), timeout: LIMIT };
    let code = boot.run(&job, &mut output, &mut errors).with_context(|| format!("{name} {side}"))?;
    let (output, said) = (String::from_utf8_lossy(&output), String::from_utf8_lossy(&errors));
    if code != 0 {
        bail!("{name} {side}: the script ended with {code}: {}", said.trim());
    }
    Seen::parse(&output, &said)
        .map_err(|why| anyhow::anyhow!("{name} {side}: {why}; stderr: {}", said.trim()))
}
