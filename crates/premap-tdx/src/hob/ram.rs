//! A TD's RAM, cut where the firmware's sections lie.

use premap_address::{Gpa, GpaRange};

use super::{Acceptance, HobError, Resource};
use crate::tdvf::{Section, SectionType};

/// Where RAM beyond the hole for devices goes on.
const FOUR_GIB: Gpa = Gpa::new(1 << 32);
/// As much RAM can lie below 4 GiB where that leaves none for above.
const LOW_MOST: u64 = 0xb000_0000;
/// Where the hole starts once some RAM lies above 4 GiB.
const LOW_SPLIT: u64 = 0x8000_0000;

/// The RAM of a TD: ranges in the order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ram {
    bytes: u64,
    ranges: Vec<GpaRange>,
}

impl Ram {
    /// RAM as QEMU's q35 lays it out.
    ///
    /// # Errors
    /// A size of 0, or of no whole pages, or too large for the address space.
    pub fn q35(bytes: u64) -> Result<Self, HobError> {
        let low = bytes.min(if bytes >= LOW_MOST { LOW_SPLIT } else { LOW_MOST });
        let high = bytes - low;
        let low = GpaRange::try_new(Gpa::new(0), low).map_err(|_| HobError::RamSize { bytes })?;
        let mut ranges = vec![low];
        if high > 0 {
            if FOUR_GIB.checked_add(high).is_none() {
                return Err(HobError::RamTooLarge { bytes });
            }
            ranges.push(GpaRange::try_new(FOUR_GIB, high).map_err(|_| HobError::RamSize { bytes })?);
        }
        Ok(Self { bytes, ranges })
    }

    /// The ranges of RAM.
    #[must_use]
    pub fn ranges(&self) -> &[GpaRange] {
        &self.ranges
    }

    /// Cuts out what the VMM adds before the TD starts, the TD_HOB and TempMem sections, as accepted; the rest is not.
    ///
    /// # Errors
    /// Such a section that does not lie in RAM.
    pub fn with_sections(&self, sections: &[Section<'_>]) -> Result<Vec<Resource>, HobError> {
        let mut added: Vec<(usize, GpaRange)> = sections
            .iter()
            .enumerate()
            .filter(|(_, section)| matches!(section.kind(), SectionType::TD_HOB | SectionType::TEMP_MEM))
            .map(|(index, section)| (index, section.memory()))
            .collect();
        added.sort_by_key(|(_, memory)| memory.start());
        let mut added = added.into_iter().peekable();
        let mut resources = Vec::new();
        for &range in &self.ranges {
            let mut next = range.start();
            while let Some((_, memory)) =
                added.next_if(|(_, memory)| range.intersection(*memory) == Some(*memory))
            {
                resources.extend(resource(next, memory.start(), Acceptance::Unaccepted));
                resources.push(Resource { range: memory, state: Acceptance::Accepted });
                next = memory.end();
            }
            resources.extend(resource(next, range.end(), Acceptance::Unaccepted));
        }
        // A section outside RAM is passed over by every range, and holds up those after it.
        match added.next() {
            Some((section, memory)) => Err(HobError::OutsideRam { section, memory, bytes: self.bytes }),
            None => Ok(resources),
        }
    }
}

/// The RAM between two addresses, if there is any.
fn resource(start: Gpa, end: Gpa, state: Acceptance) -> Option<Resource> {
    let range = GpaRange::try_new(start, end.checked_offset_from(start)?).ok()?;
    Some(Resource { range, state })
}
