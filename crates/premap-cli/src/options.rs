//! The command line: one definition that gives flags, help and the checks of single values.

use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use premap_address::PAGE_SIZE;
use premap_guest::{Access, Backing, Order};
use premap_softkvm::Profile;

use crate::exec::Exec;
use crate::linux_guest;
use crate::record::Record;
use crate::size::{Size, duration};
use crate::td::Td;
use crate::working_set;

/// Maps a virtual machine's memory before the guest touches it, and shows what that saves.
#[derive(Debug, Parser)]
#[command(
    name = "premap",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad use."
)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Map a guest's memory by each strategy, let the guest run, and compare the costs
    Run(Run),
    /// Run a guest, and write down which memory it touched, for --working-set
    Record(Record),
    /// Run a VMM, as it is, and map its guest's memory before the guest runs
    Exec(Exec),
    /// Say what this host can do, and what to change where it can't
    Doctor(Doctor),
    /// Work with TDX guests: what their firmware measures to
    #[command(subcommand)]
    Td(Td),
}

/// Flags of `premap run`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) machine: Machine,
    /// How the memory is mapped ahead of the guest: one strategy, or more with commas between, to be compared
    #[arg(long, value_enum, value_name = "STRATEGY", value_delimiter = ',', default_value = "all")]
    pub(crate) strategy: Vec<Choice>,
    /// How often each strategy is measured, once a round: figures are medians, with the lowest and the highest
    #[arg(long, value_name = "N", default_value = "1", value_parser = rounds, allow_negative_numbers = true)]
    pub(crate) repeat: u32,
    /// How much is mapped by one call: 16M, or 2M in the background, unless given
    #[arg(long, value_name = "SIZE", value_parser = pages, allow_negative_numbers = true)]
    pub(crate) chunk: Option<Size>,
    /// How long mapping may take, as 500ms or 2s; what was not reached is left to the guest's faults
    #[arg(long, value_name = "TIME", value_parser = duration, allow_negative_numbers = true)]
    pub(crate) deadline: Option<Duration>,
    #[command(flatten)]
    pub(crate) first: working_set::Flags,
    /// Print JSON: an array with an object for each strategy, its medians, accounts and all of its samples
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags that say what runs, and on what.
#[derive(Clone, Debug, Args)]
pub(crate) struct Machine {
    /// KVM to run on
    #[arg(long, value_enum, default_value_t)]
    pub(crate) backend: Backend,
    /// Linux release that the KVM in this program behaves like
    #[arg(long, value_name = "RELEASE", default_value = Profile::default().name(), value_parser = profile)]
    pub(crate) profile: Profile,
    /// Guest memory, as 512M or 4GiB
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = pages, allow_negative_numbers = true)]
    pub(crate) memory: Size,
    /// What the memory is made of
    #[arg(long, default_value = "anon", value_parser = backing())]
    pub(crate) backing: Backing,
    /// What the first-touch guest does to the first word of every page [default: write]
    #[arg(long, value_enum)]
    pub(crate) touch: Option<Touching>,
    /// In what order the first-touch guest touches its pages [default: ascending]
    #[arg(long, value_enum)]
    pub(crate) order: Option<Ordering>,
    /// Virtual CPUs, which share the work; as many threads map memory ahead
    #[arg(long, value_name = "N", default_value = "1", value_parser = vcpus, allow_negative_numbers = true)]
    pub(crate) vcpus: u32,
    #[command(flatten)]
    pub(crate) linux: linux_guest::Flags,
}

/// Flags of `premap doctor`.
#[derive(Clone, Copy, Debug, Args)]
#[command(after_help = "Exit codes: 0 pre-mapping works at both stages, 1 only partly, 2 bad use.")]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The KVM to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// /dev/kvm where it can pre-fault, else the software KVM; says which and why
    #[default]
    Auto,
    /// /dev/kvm
    Kvm,
    /// The software KVM
    Soft,
}

/// One strategy or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// Nothing is mapped ahead
    Demand,
    /// KVM_PRE_FAULT_MEMORY alone
    SecondOnly,
    /// The host's side alone
    HostOnly,
    /// The host's side, then KVM_PRE_FAULT_MEMORY
    TwoStage,
    /// The same, on spare vCPUs while the guest runs already
    Background,
    /// Each that maps before the guest runs, and demand, on a fresh machine
    All,
}

/// What the guest does to a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Touching {
    /// Write it
    #[default]
    Write,
    /// Read it
    Read,
}

impl From<Touching> for Access {
    fn from(touching: Touching) -> Self {
        match touching {
            Touching::Write => Self::Write,
            Touching::Read => Self::Read,
        }
    }
}

/// The order of the guest's touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ordering {
    /// Lowest address first
    #[default]
    Ascending,
    /// Scattered, the same way at every run
    Random,
}

impl From<Ordering> for Order {
    fn from(ordering: Ordering) -> Self {
        match ordering {
            Ordering::Ascending => Self::Ascending,
            Ordering::Random => Self::Random,
        }
    }
}

pub(crate) fn pages(text: &str) -> Result<Size, String> {
    match text.parse()? {
        Size(0) => Err("nothing to map; give 4K or more, as 512M".to_owned()),
        Size(bytes) if !bytes.is_multiple_of(PAGE_SIZE) => {
            Err("not a multiple of the page size, 4 KiB; give 4K, 2M or 512M".to_owned())
        }
        size => Ok(size),
    }
}

fn vcpus(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=1024).contains(count))
        .ok_or_else(|| "not a number of vCPUs; give 1 to 1024".to_owned())
}

pub(crate) fn rounds(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=1000).contains(count))
        .ok_or_else(|| "not a number of rounds; give 1 to 1000".to_owned())
}

fn profile(text: &str) -> Result<Profile, String> {
    let names = || Profile::ALL.iter().map(|profile| profile.name()).collect::<Vec<_>>().join(", ");
    text.parse().map_err(|_| format!("no such profile; give one of {}", names()))
}

fn backing() -> impl TypedValueParser<Value = Backing> {
    PossibleValuesParser::new(Backing::ALL.map(Backing::name)).try_map(|name| name.parse::<Backing>())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let Command::Run(run) = Options::try_parse_from(["premap", "run"]).unwrap().command else {
            panic!("not a run");
        };
        let machine = run.machine;
        assert_eq!((machine.backend, machine.memory), (Backend::Auto, Size(512 << 20)));
        assert_eq!(
            (machine.backing, machine.touch, machine.order, machine.vcpus),
            (Backing::Anonymous, None, None, 1)
        );
        assert_eq!((Touching::default(), Ordering::default()), (Touching::Write, Ordering::Ascending));
        assert_eq!((run.strategy, run.chunk, run.deadline, run.json), (vec![Choice::All], None, None, false));
    }
}
