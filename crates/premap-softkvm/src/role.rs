//! What a second-stage root is for. vCPUs of the same role share a root.

use premap_mmu::Levels;
use premap_mmu::shadow::Tag;

use crate::memslots::AddressSpace;

/// The role of a root: what its tables depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Role {
    /// The height of the tables.
    pub(crate) levels: Levels,
    /// Whose slots are mapped: those of system management mode, or the others.
    pub(crate) space: AddressSpace,
    /// Whether it is for a guest's guest.
    pub(crate) guest_mode: bool,
}

impl Role {
    /// What roots of this role in the shadow MMU are told apart by, besides their height.
    pub(crate) fn tag(self) -> Tag {
        Tag(self.space as u8 | u8::from(self.guest_mode) << 1)
    }
}

/// Address spaces whose mappings a change concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spaces {
    One(AddressSpace),
    All,
}

impl Spaces {
    pub(crate) fn have(self, space: AddressSpace) -> bool {
        self == Self::All || self == Self::One(space)
    }

    /// Whether roots of this tag are among them.
    pub(crate) fn have_tag(self, tag: Tag) -> bool {
        let space = if tag.0 & 1 == 0 { AddressSpace::Normal } else { AddressSpace::Smm };
        self.have(space)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_tells_the_space_and_the_mode() {
        let mut tags = Vec::new();
        for space in [AddressSpace::Normal, AddressSpace::Smm] {
            for guest_mode in [false, true] {
                let tag = Role { levels: Levels::Four, space, guest_mode }.tag();
                for other in [AddressSpace::Normal, AddressSpace::Smm] {
                    assert_eq!(Spaces::One(other).have_tag(tag), other == space);
                }
                assert!(Spaces::All.have_tag(tag) && !tags.contains(&tag));
                tags.push(tag);
            }
        }
    }
}
