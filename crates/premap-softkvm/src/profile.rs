//! Releases of Linux, by what a VMM can see differ between them.
//!
//! One table, a line a difference. The commit that made the difference is named beside the field.

use std::fmt;
use std::str::FromStr;

use crate::config::SpecialModes;

/// A release profile: which KVM this one is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Profile(&'static Rules);

/// What a pre-fault does where a mapping is present already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PresentMapping {
    /// Writes it anew: Accessed is lost, and small mappings may become one huge mapping.
    Rebuilt,
    /// Leaves it alone.
    Kept,
}

/// What a pre-fault does when its vCPU still holds a root that was invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StaleRoot {
    /// Tries again and again until a signal comes.
    Spins,
    /// Takes a new root.
    Replaced,
}

/// What a pre-fault does in a slot that is being deleted or moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DyingSlot {
    /// Tries again until a signal comes; meanwhile the deletion waits for it.
    Spins,
    /// EAGAIN.
    TryAgain,
}

/// What becomes of mappings when a pre-fault finds that its VM has died meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeadVm {
    /// Only the entry of the ioctl looks.
    SeenAtEntry,
    /// Every step looks: EIO.
    SeenInLoop,
}

/// What turning dirty logging off does to small mappings of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoggingOff {
    /// Unmaps them, to be faulted back in as huge ones.
    Zaps,
    /// Makes them huge in place.
    Recovers,
}

/// How a TD's memory comes in before the TD is finalized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Building {
    /// There are no TDs.
    NoTdx,
    /// A pre-fault, on any vCPU, builds the Secure-EPT and reserves; `KVM_TDX_INIT_MEM_REGION` adds only what is reserved, with
    /// its source as an argument.
    Reserved,
    /// `KVM_TDX_INIT_MEM_REGION`, on the first vCPU alone, builds and adds; pre-faulting a TD is never to be had.
    Combined,
    /// `KVM_TDX_INIT_MEM_REGION` builds and adds; pre-faulting a TD is to be had once it is finalized.
    ByItself,
}

/// What makes an MMU one that can be pre-faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Support {
    /// Its fault handler is that of two-dimensional paging, whoever fills the tables.
    ByFaultHandler,
    /// It is the TDP MMU, and its root direct.
    ByTdpMmu,
}

/// Whether a host short of memory takes shadow pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shrinker {
    /// It does: the oldest first.
    TakesPages,
    /// There is none.
    Absent,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    name: &'static str,
    /// 6.13, 6385d01eec16.
    pub(crate) present_mapping: PresentMapping,
    /// The 6.15 cycle, 20a6cff3b283.
    pub(crate) stale_root: StaleRoot,
    /// 6.18, 3ccbf6f47098.
    pub(crate) dying_slot: DyingSlot,
    /// 6.16.
    pub(crate) dead_vm: DeadVm,
    /// 6.13, with the recovery of huge pages in place.
    pub(crate) logging_off: LoggingOff,
    /// The quirks that `KVM_CAP_DISABLE_QUIRKS2` knows: bit 8 came with 6.15, bit 9 with 6.16.
    pub(crate) quirks: u64,
    /// 6.16, where TDX came: 5932ca411e53 and what it was merged with; 6.19, 6b5b71ffabf9.
    pub(crate) building: Building,
    /// As merged in 6.11; the design asked for the TDP MMU.
    pub(crate) support: Support,
    /// As merged in 6.11; the design left it open, and to refuse is what can't surprise anyone.
    pub(crate) special_modes: SpecialModes,
    /// 6.13, fe140e611d34.
    pub(crate) shrinker: Shrinker,
}

const V6_12: Rules = Rules {
    name: "6.12",
    present_mapping: PresentMapping::Rebuilt,
    stale_root: StaleRoot::Spins,
    dying_slot: DyingSlot::Spins,
    dead_vm: DeadVm::SeenAtEntry,
    logging_off: LoggingOff::Zaps,
    quirks: 0xff,
    building: Building::NoTdx,
    support: Support::ByFaultHandler,
    special_modes: SpecialModes::OwnRoot,
    shrinker: Shrinker::TakesPages,
};

const V6_16: Rules = Rules {
    name: "6.16",
    present_mapping: PresentMapping::Kept,
    stale_root: StaleRoot::Replaced,
    dead_vm: DeadVm::SeenInLoop,
    logging_off: LoggingOff::Recovers,
    quirks: 0x3ff,
    building: Building::ByItself,
    shrinker: Shrinker::Absent,
    ..V6_12
};

const V6_19: Rules = Rules { name: "6.19", dying_slot: DyingSlot::TryAgain, ..V6_16 };

const V7_2: Rules = Rules { name: "7.2", ..V6_19 };

/// Each profile by what it differs in from another.
const RULES: [Rules; 6] = [
    V6_12,
    V6_16,
    V6_19,
    V7_2,
    Rules {
        name: "proposal",
        building: Building::Reserved,
        support: Support::ByTdpMmu,
        special_modes: SpecialModes::Refused,
        shrinker: Shrinker::TakesPages,
        ..V7_2
    },
    Rules { name: "combined", building: Building::Combined, shrinker: Shrinker::TakesPages, ..V7_2 },
];

/// A name that no profile has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no profile `{name}`; there are {}", Profile::names())]
pub struct UnknownProfile {
    /// The name that was asked for.
    pub name: String,
}

impl Profile {
    /// Linux 6.12, the default: the oldest release that Debian and others still support with pre-faulting.
    pub const V6_12: Self = Self(&RULES[0]);
    /// Linux 6.16 and 6.17.
    pub const V6_16: Self = Self(&RULES[1]);
    /// Linux 6.18 and 6.19.
    pub const V6_19: Self = Self(&RULES[2]);
    /// Linux 7.2.
    pub const V7_2: Self = Self(&RULES[3]);
    /// The design of April 2024 that this project implements: pre-faulting reserves a TD's memory ahead; it needs the TDP MMU,
    /// and is refused in system management mode and guest mode unless [`SoftConfig`](crate::SoftConfig) says otherwise; the
    /// host's shrinker is still there. In all else it is the newest kernel.
    pub const PROPOSAL: Self = Self(&RULES[4]);
    /// What came before that design, to compare it with: a TD's memory is mapped and added by one call, on one vCPU, and the
    /// host's shrinker is still there.
    pub const COMBINED: Self = Self(&RULES[5]);
    /// The profiles of releases, oldest first.
    pub const RELEASES: [Self; 4] = [Self::V6_12, Self::V6_16, Self::V6_19, Self::V7_2];
    /// Every profile.
    pub const ALL: [Self; RULES.len()] =
        [Self::V6_12, Self::V6_16, Self::V6_19, Self::V7_2, Self::PROPOSAL, Self::COMBINED];

    /// The profile of this name.
    ///
    /// # Errors
    /// Where none has it; the error lists those there are.
    pub fn parse(name: &str) -> Result<Self, UnknownProfile> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.name() == name)
            .ok_or_else(|| UnknownProfile { name: name.to_owned() })
    }

    /// The name, as [`parse`](Self::parse) takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0.name
    }

    pub(crate) const fn rules(self) -> &'static Rules {
        self.0
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }
}

impl Default for Profile {
    fn default() -> Self {
        Self::V6_12
    }
}

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        Self::parse(name)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Profile({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_is_found_by_its_name() {
        for profile in Profile::ALL {
            assert_eq!(Profile::parse(profile.name()), Ok(profile));
        }
        let error = Profile::parse("5.4").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no profile `5.4`; there are 6.12, 6.16, 6.19, 7.2, proposal, combined"
        );
    }
}
