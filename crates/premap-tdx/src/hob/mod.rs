//! The TD HOB: what the VMM tells the firmware about the TD's memory.
//!
//! A list of hand-off blocks that the VMM writes into the TD_HOB section before the TD starts and whose address it gives
//! every vCPU in RCX. The section is not measured into the MRTD: the firmware extends the list's digest into RTMR 0
//! itself, before it believes a word. All fields are little-endian:
//!
//! ```text
//! PHIT       56 bytes   0 type 1   2 length 56   4 0   8 version 9   12 boot mode 0
//!                      16 four addresses, all 0       48 EndOfHobList, an address
//! resource   48 bytes   0 type 3   2 length 48   4 0   8 owner, 16 zeros
//!   ... n times        24 resource type               28 attributes 7 (present, initialised, tested)
//!                      32 start address               40 length
//! end         8 bytes   0 type 0xffff   2 length 8   4 0
//! ```
//!
//! EndOfHobList is the address just past the end block. Memory that the VMM has added already, TD_HOB and TempMem
//! sections, is resource type 0 (system memory); all other RAM is type 7 (unaccepted), for the guest to accept. Ranges
//! come in the order of their addresses, and neighbours are not merged. The digest that goes to RTMR 0 leaves the end
//! block out.
//!
//! RAM as QEMU's q35 lays it out: from 0 up to the hole for devices below 4 GiB, the rest from 4 GiB on. From 0xb0000000
//! bytes of RAM on, the hole starts at 0x80000000, so that what lies above is aligned to 1 GiB.
//!
//! Sources: UEFI Platform Initialization specification, volume 3 (HOBs); Intel TDX Virtual Firmware Design Guide, section
//! 4.2; QEMU's hw/i386/tdvf-hob.c and pc_q35.c for the order and the layout.

mod ram;

use premap_address::{Gpa, GpaRange};

use crate::digest::Digest;
use crate::sha384::{DefaultSha384, Sha384};
use crate::tdvf::{Section, Tdvf};

pub use ram::Ram;

const PHIT: u16 = 1;
const RESOURCE: u16 = 3;
const END: u16 = 0xffff;
const PHIT_LEN: u16 = 56;
const RESOURCE_LEN: u16 = 48;
const END_LEN: u16 = 8;
const PHIT_VERSION: u32 = 9;
/// Present, initialised, tested.
const RESOURCE_ATTRIBUTES: u32 = 7;

/// Why there is no TD HOB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HobError {
    /// The firmware has no place for it.
    #[error("the firmware has no TD_HOB section")]
    NoSection,
    /// The RAM is not whole pages, or none.
    #[error("{bytes} bytes of RAM: give a multiple of 4 KiB above 0")]
    RamSize {
        /// The RAM asked for.
        bytes: u64,
    },
    /// The RAM would reach beyond 2^64.
    #[error("{bytes} bytes of RAM do not fit the address space")]
    RamTooLarge {
        /// The RAM asked for.
        bytes: u64,
    },
    /// A section that the VMM fills with RAM lies outside it.
    #[error("section {section} wants RAM at {memory}, but there is none with {bytes} bytes in all")]
    OutsideRam {
        /// Which section, counted from 0.
        section: usize,
        /// Its memory.
        memory: GpaRange,
        /// The RAM asked for.
        bytes: u64,
    },
    /// The list is longer than its section.
    #[error("the list takes {needed} bytes, its section has {room}")]
    TooLong {
        /// The list's length.
        needed: u64,
        /// The section's.
        room: u64,
    },
}

/// A range of RAM, and whether the TD has it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Where.
    pub range: GpaRange,
    /// Whether the guest must still accept it.
    pub state: Acceptance,
}

/// Whether a range of RAM is the guest's already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// Added by the VMM before the TD started.
    Accepted,
    /// To be accepted by the guest.
    Unaccepted,
}

impl Acceptance {
    /// The type of a resource block of such memory.
    const fn resource_type(self) -> u32 {
        match self {
            Self::Accepted => 0,
            Self::Unaccepted => 7,
        }
    }
}

/// A TD HOB, ready to be put at its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TdHob {
    gpa: Gpa,
    resources: Vec<Resource>,
    bytes: Vec<u8>,
}

impl TdHob {
    /// Makes the list for a firmware and a TD with `bytes` of RAM, laid out as on q35.
    ///
    /// # Errors
    /// No TD_HOB section, a size of RAM that can't be, sections outside RAM, a section too short for the list.
    pub fn q35(tdvf: &Tdvf<'_>, bytes: u64) -> Result<Self, HobError> {
        let section = tdvf.td_hob().ok_or(HobError::NoSection)?;
        let resources = Ram::q35(bytes)?.with_sections(tdvf.sections())?;
        Self::new(section, resources)
    }

    /// Makes the list of these resources, for this section.
    ///
    /// # Errors
    /// The section is too short for the list.
    pub fn new(section: &Section<'_>, resources: Vec<Resource>) -> Result<Self, HobError> {
        let gpa = section.memory().start();
        let blocks: u64 = resources.iter().map(|_| u64::from(RESOURCE_LEN)).sum();
        let needed = u64::from(PHIT_LEN) + blocks + u64::from(END_LEN);
        let room = section.memory().bytes();
        if needed > room {
            return Err(HobError::TooLong { needed, room });
        }
        let bytes = write(gpa.wrapping_add(needed), &resources);
        Ok(Self { gpa, resources, bytes })
    }

    /// Where the list goes, and what RCX tells the guest.
    #[must_use]
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// The RAM that the list tells of.
    #[must_use]
    pub fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// The list's bytes, end block included.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the firmware extends into RTMR 0: the SHA-384 of the list without its end block.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut hash = DefaultSha384::new();
        hash.update(&self.bytes[..self.bytes.len() - usize::from(END_LEN)]);
        hash.finish()
    }
}

fn write(end_of_list: Gpa, resources: &[Resource]) -> Vec<u8> {
    let mut bytes = Vec::new();
    block(&mut bytes, PHIT, PHIT_LEN);
    bytes.extend(PHIT_VERSION.to_le_bytes());
    bytes.extend([0; 36]);
    bytes.extend(end_of_list.raw().to_le_bytes());
    for Resource { range, state } in resources {
        block(&mut bytes, RESOURCE, RESOURCE_LEN);
        bytes.extend([0; 16]);
        bytes.extend(state.resource_type().to_le_bytes());
        bytes.extend(RESOURCE_ATTRIBUTES.to_le_bytes());
        bytes.extend(range.start().raw().to_le_bytes());
        bytes.extend(range.bytes().to_le_bytes());
    }
    block(&mut bytes, END, END_LEN);
    bytes
}

/// Starts a block: type, length, four reserved bytes.
fn block(bytes: &mut Vec<u8>, kind: u16, len: u16) {
    bytes.extend(kind.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend([0; 4]);
}
