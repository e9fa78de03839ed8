//! What VMMs differ in when they load the same firmware.

use std::fmt;
use std::str::FromStr;

use crate::tdvf::{Attributes, Section};

/// The order of the operations on a section's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// Each page is added and then measured, before the next. KVM since 6.16, and with it QEMU and Cloud Hypervisor;
    /// Google Cloud.
    #[default]
    Page,
    /// All pages of a section are added, then all are measured. The KVM patches of 2024 and what was built on them, such
    /// as QEMU 8.2 of Ubuntu 24.04.
    Region,
}

/// What becomes of a section that is marked PAGE.AUG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PageAug {
    /// It is added as any other: the mark is ignored, as QEMU and Cloud Hypervisor do.
    #[default]
    Added,
    /// Its pages come after the measurement is final, as the mark says.
    LeftOut,
}

/// How a VMM loads a firmware's sections, as far as the measurement can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rules {
    /// The order of the operations.
    pub order: Order,
    /// What becomes of sections marked PAGE.AUG.
    pub page_aug: PageAug,
}

impl Order {
    /// Every order, the usual one first.
    pub const ALL: [Self; 2] = [Self::Page, Self::Region];

    /// The order's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Region => "region",
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no [`Order`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown order {0:?}: give page or region")]
pub struct UnknownOrder(pub String);

impl FromStr for Order {
    type Err = UnknownOrder;

    fn from_str(name: &str) -> Result<Self, UnknownOrder> {
        let known = Self::ALL.into_iter().find(|order| order.name() == name);
        known.ok_or_else(|| UnknownOrder(name.to_owned()))
    }
}

impl From<Order> for Rules {
    fn from(order: Order) -> Self {
        Self { order, ..Self::default() }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} order", self.order)?;
        match self.page_aug {
            PageAug::Added => Ok(()),
            PageAug::LeftOut => f.write_str(", PAGE.AUG sections left out"),
        }
    }
}

impl Rules {
    /// Every set of rules that makes a difference for these sections, the usual one first.
    pub fn all(sections: &[Section<'_>]) -> impl Iterator<Item = Self> + use<> {
        let marked = sections.iter().any(|section| section.attributes().contains(Attributes::PAGE_AUG));
        let page_aug: &[_] = if marked { &[PageAug::Added, PageAug::LeftOut] } else { &[PageAug::Added] };
        page_aug.iter().flat_map(|&page_aug| Order::ALL.map(|order| Self { order, page_aug }))
    }

    /// Whether a section's memory is there when the measurement ends.
    #[must_use]
    pub fn loads(self, section: &Section<'_>) -> bool {
        self.page_aug == PageAug::Added || !section.attributes().contains(Attributes::PAGE_AUG)
    }
}
