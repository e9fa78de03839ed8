//! What a launch did.

use serde::Serialize;

use crate::report::Report;

/// A part of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// `KVM_TDX_INIT_VCPU` on every vCPU.
    InitVcpus,
    /// The Secure-EPT of all pieces is built, in parallel.
    Reserve,
    /// Pages are added and measured, one after another.
    Add,
    /// The measurement is fixed.
    Finalize,
    /// What is left of the guest's memory is mapped, in parallel.
    MapRest,
}

impl Phase {
    /// The phase's name, as serde writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InitVcpus => "init_vcpus",
            Self::Reserve => "reserve",
            Self::Add => "add",
            Self::Finalize => "finalize",
            Self::MapRest => "map_rest",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// What a phase did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseReport {
    /// Which.
    pub phase: Phase,
    /// How long it took, from first to last.
    pub ns: u64,
    /// Bytes of guest memory that it dealt with.
    pub bytes: u64,
}

/// What a launch did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LaunchReport {
    /// The phases, in order. One that this KVM does not have did nothing.
    pub phases: Vec<PhaseReport>,
    /// What became of each byte that was to be reserved; unsupported where this KVM builds tables as pages are added.
    pub reserve: Report,
    /// What became of each byte that was to be mapped after the launch.
    pub rest: Report,
}
