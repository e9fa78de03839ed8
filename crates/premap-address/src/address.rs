//! Address and frame newtypes.

use core::fmt;

use crate::page::{PAGE_SHIFT, PAGE_SIZE, PageSize};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(transparent))]
        pub struct $name(u64);

        impl $name {
            #[doc = concat!("Makes ", $what, " from its raw value in bytes.")]
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw value in bytes.
            #[must_use]
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on, or `None` if that wraps.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// The address `bytes` further on, modulo 2^64.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// How many bytes this address lies past `base`, or `None` if it lies before it.
            #[must_use]
            pub const fn checked_offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// The start of the page of this size that holds the address.
            #[must_use]
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !(size.bytes() - 1))
            }

            /// The first page boundary of this size at or after the address, or `None` if that wraps.
            #[must_use]
            pub const fn checked_align_up(self, size: PageSize) -> Option<Self> {
                match self.0.checked_add(size.bytes() - 1) {
                    Some(raw) => Some(Self(raw).align_down(size)),
                    None => None,
                }
            }

            /// Whether the address is the start of a page of this size.
            #[must_use]
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & (size.bytes() - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address!(
    /// A guest-physical address.
    Gpa,
    "a guest-physical address"
);
address!(
    /// A host-virtual address: a pointer's value in the VMM's address space.
    Hva,
    "a host-virtual address"
);
address!(
    /// A host-physical address.
    Hpa,
    "a host-physical address"
);

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident of $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(transparent))]
        pub struct $name(u64);

        impl $name {
            /// Makes a frame from its number, in units of 4 KiB.
            #[must_use]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// The frame's number, in units of 4 KiB.
            #[must_use]
            pub const fn number(self) -> u64 {
                self.0
            }

            /// The frame `pages` further on, or `None` if its number wraps.
            #[must_use]
            pub const fn checked_add(self, pages: u64) -> Option<Self> {
                match self.0.checked_add(pages) {
                    Some(number) => Some(Self(number)),
                    None => None,
                }
            }

            /// The address of the frame's first byte; bits above 2^64 are lost.
            #[must_use]
            pub const fn address(self) -> $address {
                $address::new(self.0 << PAGE_SHIFT)
            }

            /// The frame at the start of the larger page that holds this one.
            #[must_use]
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !(size.pages() - 1))
            }

            /// Whether a page of this size can start here.
            #[must_use]
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & (size.pages() - 1) == 0
            }
        }

        impl $address {
            /// The frame that holds the address.
            #[must_use]
            pub const fn frame(self) -> $name {
                $name(self.raw() >> PAGE_SHIFT)
            }

            /// The offset of the address in its 4 KiB page.
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.raw() & (PAGE_SIZE - 1)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

frame!(
    /// A guest frame number: a guest-physical address in units of 4 KiB.
    Gfn of Gpa
);
frame!(
    /// A host page frame number: a host-physical address in units of 4 KiB.
    Pfn of Hpa
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_rounds_to_the_page_asked_for() {
        let gpa = Gpa::new(0x40_1234);
        assert_eq!(gpa.align_down(PageSize::Size4K), Gpa::new(0x40_1000));
        assert_eq!(gpa.align_down(PageSize::Size2M), Gpa::new(0x40_0000));
        assert_eq!(gpa.checked_align_up(PageSize::Size2M), Some(Gpa::new(0x60_0000)));
        assert!(Gpa::new(1 << 30).is_aligned(PageSize::Size1G));
        assert!(!gpa.is_aligned(PageSize::Size4K));
    }

    #[test]
    fn overflow_is_told_and_never_wraps_unasked() {
        let last = Gpa::new(u64::MAX);
        assert_eq!(last.checked_add(1), None);
        assert_eq!(last.checked_align_up(PageSize::Size4K), None);
        assert_eq!(last.wrapping_add(1), Gpa::new(0));
        assert_eq!(Gpa::new(0).checked_offset_from(last), None);
    }

    #[test]
    fn frames_and_addresses_convert_both_ways() {
        assert_eq!(Gpa::new(0x1234).frame(), Gfn::new(1));
        assert_eq!(Gfn::new(1).address(), Gpa::new(0x1000));
        assert_eq!(Hpa::new(0x1234).page_offset(), 0x234);
        assert_eq!(Pfn::new(0x3ff).align_down(PageSize::Size2M), Pfn::new(0x200));
    }
}
