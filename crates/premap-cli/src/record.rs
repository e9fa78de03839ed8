//! `premap record`: runs a guest on memory that is mapped on demand, and writes down what it touched.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use premap::Touch;
use premap::working_set::{Identity, Recorder, WorkingSet};
use serde_json::json;

use crate::backend::{self, Backend};
use crate::first_touch;
use crate::linux_guest::{Bootable, Guest};
use crate::options::Machine;
use crate::output::account::{self, Account};
use crate::run::{check, setting};
use crate::size::{Size, counted};

/// How often the memory is looked at.
const INTERVAL: Duration = Duration::from_millis(4);

/// Flags of `premap record`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The flags are those of `premap run`, but for what they say of mapping: there is none."
)]
pub(crate) struct Record {
    /// Where the working set is written
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    machine: Machine,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a run left.
pub(crate) struct Recorded {
    pub(crate) set: WorkingSet,
    /// Bytes that were watched.
    pub(crate) watched: u64,
    pub(crate) looks: u64,
    pub(crate) method: String,
    pub(crate) faults: u64,
}

/// Records, writes the file, and says what is in it.
pub(crate) fn run(options: &Record) -> anyhow::Result<ExitCode> {
    let machine = &options.machine;
    check(machine)?;
    let recorded = match machine.linux.guest {
        Guest::Linux => Bootable::new(machine)?.record()?,
        Guest::FirstTouch => match backend::choose(machine.backend, machine.profile)? {
            Backend::Kvm(linux) => first_touch::record(&linux, &setting(machine))?,
            Backend::Soft(soft) => first_touch::record(&soft, &setting(machine))?,
        },
    };
    let path = options.out.display();
    std::fs::write(&options.out, recorded.set.encode()).with_context(|| format!("--out {path}"))?;
    let text = if options.json { json(options, &recorded) } else { text(options, &recorded) };
    stdout().lock().write_all(text.as_bytes()).context("writing to stdout")?;
    Ok(ExitCode::SUCCESS)
}

/// Watches `memory` while a guest runs, which is to give its faults.
pub(crate) fn watch(
    memory: &[premap::Region],
    identity: Identity,
    guest: impl FnOnce() -> anyhow::Result<u64>,
) -> anyhow::Result<Recorded> {
    let failed = "looking at the guest's memory failed";
    let mut recorder = Recorder::new(memory).context(failed)?;
    let faults = recorder.watch(INTERVAL, guest).context(failed)??;
    let (looks, method) = (recorder.looks(), recorder.method().to_string());
    let set = recorder.finish(identity)?;
    ensure!(set.bytes() > 0, "the guest touched nothing");
    let watched = memory.iter().map(|region| region.range.bytes()).sum();
    Ok(Recorded { set, watched, looks, method, faults })
}

/// What became of the memory that was watched. The guest maps it by its own touches: `mapped` is what it touched, and
/// `skipped` what it did not. Nothing fails or is given up: the whole recording would be.
fn account(recorded: &Recorded) -> Account {
    let (asked, mapped) = (recorded.watched, recorded.set.bytes());
    Account { asked, mapped, skipped: asked.saturating_sub(mapped), ..Account::default() }
}

/// Bytes that were written, and that were only read.
fn bytes(set: &WorkingSet) -> (u64, u64) {
    let written = set.touched().iter().filter(|touched| touched.touch == Touch::Write);
    let written = written.map(|touched| touched.range.bytes()).sum();
    (written, set.bytes() - written)
}

fn text(options: &Record, recorded: &Recorded) -> String {
    let Recorded { set, looks, method, faults, .. } = recorded;
    let (written, read) = bytes(set);
    let table = account::table("memory", [("watched".to_owned(), "guest", account(recorded))]);
    format!(
        "{}: {} in {}, {} of it written and {} only read.\n\
         Recorded by {method} in {}, while the guest took {}.\n\n{table}\n\n\
         asked        what was watched: the sum of the other four\n\
         mapped       what the guest touched, and so is in the file\n\
         skipped      what it did not touch\n",
        options.out.display(),
        Size(set.bytes()),
        counted(set.touched().len() as u64, "range"),
        Size(written),
        Size(read),
        counted(*looks, "look"),
        counted(*faults, "fault"),
    )
}

fn json(options: &Record, recorded: &Recorded) -> String {
    let Recorded { set, looks, method, faults, .. } = recorded;
    let (written, read) = bytes(set);
    let Account { asked, mapped, skipped, failed, abandoned } = account(recorded);
    let object = json!({
        "out": options.out, "asked": asked, "mapped": mapped, "skipped": skipped, "failed": failed,
        "abandoned": abandoned, "bytes": set.bytes(), "ranges": set.touched().len(), "written_bytes": written,
        "read_bytes": read, "page_bytes": set.page_size().bytes(), "identity": set.identity().to_string(),
        "method": method, "looks": looks, "faults": faults,
    });
    format!("{object:#}\n")
}
