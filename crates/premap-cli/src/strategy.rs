//! The ways of mapping memory before the guest runs.

use premap::Stages;
use serde::{Serialize, Serializer};

use crate::options::Choice;

/// One way of mapping memory before the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strategy {
    Demand,
    SecondOnly,
    HostOnly,
    TwoStage,
}

impl Strategy {
    /// Every strategy, the one that others are compared with first.
    pub(crate) const ALL: [Self; 4] = [Self::Demand, Self::SecondOnly, Self::HostOnly, Self::TwoStage];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::SecondOnly => "second-only",
            Self::HostOnly => "host-only",
            Self::TwoStage => "two-stage",
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
        }
    }

    /// The engine's stages, if it has anything to do.
    pub(crate) const fn stages(self) -> Option<Stages> {
        match self {
            Self::Demand => None,
            Self::SecondOnly => Some(Stages::Second),
            Self::HostOnly => Some(Stages::Host),
            Self::TwoStage => Some(Stages::Both),
        }
    }
}

impl Serialize for Strategy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Choice {
    /// The strategies chosen, in the order in which they run.
    pub(crate) fn strategies(self) -> Vec<Strategy> {
        match self {
            Self::Demand => vec![Strategy::Demand],
            Self::SecondOnly => vec![Strategy::SecondOnly],
            Self::HostOnly => vec![Strategy::HostOnly],
            Self::TwoStage => vec![Strategy::TwoStage],
            Self::All => Strategy::ALL.to_vec(),
        }
    }
}
