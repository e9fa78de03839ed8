//! `--working-set` and `--budget`: what is mapped first, and how much at most.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use premap::working_set::{Identity, WorkingSet};
use premap::{HostMemory, Region};

use crate::failure::BadUse;
use crate::files::{self, Kind};
use crate::options::pages;
use crate::size::Size;

/// The flags that put memory in order and limit it.
#[derive(Clone, Debug, Default, Args)]
#[group(skip)]
pub(crate) struct Flags {
    /// Map first what this file says that the guest touches; `premap record` writes it
    #[arg(long, value_name = "FILE")]
    working_set: Option<PathBuf>,
    /// How much is mapped at most, as 64M, or `working-set` for as much as that has
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    budget: Option<Most>,
}

/// How much is mapped at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Most {
    Bytes(Size),
    WorkingSet,
}

impl FromStr for Most {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "working-set" { Ok(Self::WorkingSet) } else { pages(text).map(Self::Bytes) }
    }
}

/// What the flags came to, for one image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct First {
    set: Option<(WorkingSet, Identity, PathBuf)>,
    /// How many bytes are mapped at most.
    pub(crate) budget: Option<u64>,
}

impl Flags {
    /// Reads the file, if there is one, for the image that `identity` names.
    pub(crate) fn read(&self, identity: impl FnOnce() -> Identity) -> anyhow::Result<First> {
        let set = self.working_set.as_deref().map(read).transpose()?;
        let budget = match (self.budget, &set) {
            (None, _) => None,
            (Some(Most::Bytes(Size(bytes))), _) => Some(bytes),
            (Some(Most::WorkingSet), Some(set)) => Some(set.bytes()),
            (Some(Most::WorkingSet), None) => {
                return Err(BadUse(
                    "--budget working-set: needs a working set; add --working-set FILE".to_owned(),
                )
                .into());
            }
        };
        let path = self.working_set.clone().unwrap_or_default();
        Ok(First { set: set.map(|set| (set, identity(), path)), budget })
    }
}

impl First {
    /// What is done where not all memory can be had: what comes first was said to be worth it by a working set, and by a
    /// limit of the user's own.
    pub(crate) fn host_memory(&self) -> HostMemory {
        if self.set.is_some() || self.budget.is_some() { HostMemory::Front } else { HostMemory::Whole }
    }

    /// Puts a machine's memory in order.
    pub(crate) fn order(&self, memory: Vec<Region>) -> Result<Vec<Region>, BadUse> {
        let Some((set, image, path)) = &self.set else { return Ok(memory) };
        set.first(image, &memory).map_err(|misfit| refused(path, &misfit))
    }
}

fn read(path: &Path) -> anyhow::Result<WorkingSet> {
    let bytes = files::read(path, &format!("--working-set {}", path.display()), Kind::WORKING_SET)?;
    Ok(WorkingSet::decode(&bytes).map_err(|malformed| refused(path, &malformed))?)
}

fn refused(path: &Path, why: &dyn std::fmt::Display) -> BadUse {
    BadUse(format!("--working-set {}: {why}", path.display()))
}
