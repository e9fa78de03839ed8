//! The machine that the module runs on.

use crate::phymem::{HpaRange, KeyIds};

/// The machine, and what of its memory the module may give to TDs.
#[derive(Clone, Debug)]
pub struct Config {
    /// The memory there is. Pages cost nothing until they are touched.
    pub memory: Vec<HpaRange>,
    /// The memory that TDs can have. Hardware wants TDMRs of whole GiB; the model takes any pages.
    pub tdmrs: Vec<HpaRange>,
    /// Parts of TDMRs that TDs can't have.
    pub reserved: Vec<HpaRange>,
    /// The HKIDs.
    pub keys: KeyIds,
    /// Processor packages, on each of which a TD's key must be configured; 1 to 64.
    pub packages: u8,
}

impl Config {
    /// One package, 64 HKIDs, and this memory, all of which TDs can have.
    #[must_use]
    pub fn new(memory: HpaRange) -> Self {
        Self {
            memory: vec![memory],
            tdmrs: vec![memory],
            reserved: Vec::new(),
            keys: KeyIds::default(),
            packages: 1,
        }
    }
}

/// Why there can be no such machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Two ranges of one kind overlap.
    #[error("{0} and {1} overlap: give each page once")]
    Overlap(HpaRange, HpaRange),
    /// A TDMR reaches beyond the memory there is.
    #[error("TDMR {0} is not within one range of memory")]
    NoMemory(HpaRange),
    /// Memory reaches into the address bits that hold the HKID.
    #[error("memory {0} reaches beyond the {1} address bits that {2} bits of HKID leave")]
    BeyondAddresses(HpaRange, u32, u32),
    /// The HKIDs don't fit.
    #[error("private HKIDs {0:?} don't fit {1} bits: give a range within, and 1 to 15 bits")]
    Keys(std::ops::Range<u16>, u32),
    /// There are no packages, or too many.
    #[error("{0} packages: give 1 to 64")]
    Packages(u8),
}

impl Config {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let KeyIds { bits, private } = &self.keys;
        if !(1..=15).contains(bits) || private.is_empty() || private.end > 1 << bits || private.start == 0 {
            return Err(ConfigError::Keys(private.clone(), *bits));
        }
        if !(1..=64).contains(&self.packages) {
            return Err(ConfigError::Packages(self.packages));
        }
        for ranges in [&self.memory, &self.tdmrs, &self.reserved] {
            for (index, range) in ranges.iter().enumerate() {
                if let Some(other) = ranges[..index].iter().find(|other| other.overlaps(*range)) {
                    return Err(ConfigError::Overlap(*other, *range));
                }
            }
        }
        let width = 52 - bits;
        if let Some(range) = self.memory.iter().find(|range| range.end().raw() > 1 << width) {
            return Err(ConfigError::BeyondAddresses(*range, width, *bits));
        }
        let backed = |tdmr: &&HpaRange| !self.memory.iter().any(|range| range.contains(**tdmr));
        self.tdmrs.iter().find(backed).map_or(Ok(()), |tdmr| Err(ConfigError::NoMemory(*tdmr)))
    }
}
