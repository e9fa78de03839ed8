//! The ways of mapping memory ahead of the guest.

use premap::Stages;
use serde::{Serialize, Serializer};

use crate::options::Choice;

/// One way of mapping memory ahead of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strategy {
    Demand,
    SecondOnly,
    HostOnly,
    TwoStage,
    /// The only one that does not come before the guest, but beside it.
    Background,
}

impl Strategy {
    /// Every strategy that maps before the guest runs, the one that others are compared with first.
    pub(crate) const BEFORE: [Self; 4] = [Self::Demand, Self::SecondOnly, Self::HostOnly, Self::TwoStage];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::SecondOnly => "second-only",
            Self::HostOnly => "host-only",
            Self::TwoStage => "two-stage",
            Self::Background => "background",
        }
    }

    /// What it is, for somebody who reads of it for the first time.
    pub(crate) const fn meaning(self) -> &'static str {
        match self {
            Self::Demand => "nothing is mapped ahead; the guest's first touch of a page faults",
            Self::SecondOnly => "KVM_PRE_FAULT_MEMORY alone: guest addresses mapped to what the host has",
            Self::HostOnly => {
                "MADV_POPULATE alone: the host has the pages, the guest's addresses aren't mapped"
            }
            Self::TwoStage => "premap: the host's pages first, then the guest's addresses mapped to them",
            Self::Background => {
                "premap beside the guest: it runs at once, and spare vCPUs map ahead of it meanwhile"
            }
        }
    }

    /// The engine's stages, if it has anything to do.
    pub(crate) const fn stages(self) -> Option<Stages> {
        match self {
            Self::Demand => None,
            Self::SecondOnly => Some(Stages::Second),
            Self::HostOnly => Some(Stages::Host),
            Self::TwoStage | Self::Background => Some(Stages::Both),
        }
    }
}

impl Serialize for Strategy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// The strategies chosen, each once, in the order in which they run.
pub(crate) fn chosen(choices: &[Choice]) -> Vec<Strategy> {
    let mut chosen = Vec::new();
    for strategy in choices.iter().flat_map(|choice| choice.strategies()) {
        if !chosen.contains(&strategy) {
            chosen.push(strategy);
        }
    }
    chosen
}

impl Choice {
    fn strategies(self) -> Vec<Strategy> {
        match self {
            Self::Demand => vec![Strategy::Demand],
            Self::SecondOnly => vec![Strategy::SecondOnly],
            Self::HostOnly => vec![Strategy::HostOnly],
            Self::TwoStage => vec![Strategy::TwoStage],
            Self::Background => vec![Strategy::Background],
            Self::All => Strategy::BEFORE.to_vec(),
        }
    }
}
