//! TDVF metadata: what an OVMF image tells a VMM about building a TD from it.
//!
//! A TD's first memory comes from its firmware, and the firmware says which: a descriptor in the image lists sections,
//! each a range of guest memory, the bytes of the image that go there, and whether they are measured. The way to it is a
//! table of GUIDed structures at the image's end (`locate.rs`), the descriptor is a header and
//! an array. Both come from a file that anyone may have made, so every claim is checked before it is used:
//! [`Tdvf::parse`] gives sections that need no further check, or a [`TdvfError`] that names the field, its offset and
//! what is wrong. It takes time and memory in proportion to the bytes that are there, never to a size that is claimed.
//!
//! Sources: Intel TDX Virtual Firmware Design Guide, section 11 (TDVF descriptor); EDK II's OvmfPkg/ResetVector; the checks
//! that QEMU makes (hw/i386/tdvf.c) are among those made here.

mod bytes;
mod check;
mod descriptor;
mod error;
mod field;
mod guid;
mod image;
mod locate;
mod section;

pub use check::MAX_MEMORY;
pub use error::{Fault, TdvfError};
pub use field::{Field, SectionField};
pub use image::Image;
pub use section::{Attributes, Section, SectionType};

/// The metadata of an image, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tdvf<'a> {
    offset: u64,
    sections: Vec<Section<'a>>,
}

impl<'a> Tdvf<'a> {
    /// Finds, reads and checks the metadata of an image.
    ///
    /// # Errors
    /// No metadata, or any that is wrong: [`Fault`] has the cases.
    pub fn parse(image: &'a Image<'_>) -> Result<Self, TdvfError> {
        let offset = locate::descriptor(image.bytes())?;
        let entries = descriptor::entries(image.bytes(), offset)?;
        let sections = check::sections(image, &entries)?;
        check::together(&entries, &sections)?;
        Ok(Self { offset, sections })
    }

    /// Where the descriptor lies in the image.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The sections, in the order of the image, which is the order in which VMMs load them.
    #[must_use]
    pub fn sections(&self) -> &[Section<'a>] {
        &self.sections
    }

    /// The section for the TD HOB, if the firmware wants one. There is never a second.
    #[must_use]
    pub fn td_hob(&self) -> Option<&Section<'a>> {
        self.sections.iter().find(|section| section.kind() == SectionType::TD_HOB)
    }
}
