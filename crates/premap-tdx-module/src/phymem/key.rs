//! Host key ids in host-physical addresses.

use std::ops::Range;

use premap_address::{Hpa, PAGE_SIZE, Pfn};

/// How many bits a host-physical address has, its HKID included.
const WIDTH: u32 = 52;

/// A host key id: which key the memory controller uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hkid(pub u16);

/// Which bits of a host-physical address are the HKID, and which HKIDs are private. Source: Intel TDX Module 1.5 base
/// specification, MKTME key ids; on hardware IA32_TME_ACTIVATE and IA32_MKTME_KEYID_PARTITIONING say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyIds {
    /// How many bits, from bit 51 down; 1 to 15.
    pub bits: u32,
    /// The private HKIDs: those that TDs may have. All others are shared.
    pub private: Range<u16>,
}

impl Default for KeyIds {
    /// 64 HKIDs, of which the upper half is private.
    fn default() -> Self {
        Self { bits: 6, private: 32..64 }
    }
}

impl KeyIds {
    const fn shift(&self) -> u32 {
        WIDTH - self.bits
    }

    /// Puts an HKID into an address that has none.
    #[must_use]
    pub fn address(&self, hpa: Hpa, hkid: Hkid) -> Hpa {
        Hpa::new(hpa.raw() | u64::from(hkid.0) << self.shift())
    }

    /// The address without HKID, and the HKID; `None` if a bit above 51 is set.
    pub(crate) fn split(&self, hpa: Hpa) -> Option<(Hpa, Hkid)> {
        let hkid = hpa.raw() >> self.shift();
        let hkid = u16::try_from(hkid).ok().filter(|_| hpa.raw() >> WIDTH == 0)?;
        Some((Hpa::new(hpa.raw() & ((1 << self.shift()) - 1)), Hkid(hkid)))
    }

    /// The page at an address that must be aligned to `bytes` and have no HKID.
    pub(crate) fn private_page(&self, hpa: Hpa, bytes: u64) -> Option<Pfn> {
        let (page, hkid) = self.split(hpa)?;
        (hkid.0 == 0 && page.raw().is_multiple_of(bytes.max(PAGE_SIZE))).then(|| page.frame())
    }

    /// The address without HKID of what must be aligned to `bytes` and have a shared HKID.
    pub(crate) fn shared(&self, hpa: Hpa, bytes: u64) -> Option<Hpa> {
        let (address, hkid) = self.split(hpa)?;
        (!self.private.contains(&hkid.0) && address.raw().is_multiple_of(bytes)).then_some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_by_their_hkid() {
        let keys = KeyIds::default();
        let at = |hkid| keys.address(Hpa::new(0x1000), Hkid(hkid));
        assert_eq!(at(33).raw(), 33 << 46 | 0x1000);
        assert_eq!(keys.split(at(33)), Some((Hpa::new(0x1000), Hkid(33))));
        assert_eq!(keys.private_page(at(0), 4096), Some(Pfn::new(1)));
        assert_eq!(keys.private_page(at(1), 4096), None);
        assert_eq!(keys.private_page(at(0), 2 << 20), None);
        assert_eq!(keys.shared(at(31), 4096), Some(Hpa::new(0x1000)));
        assert_eq!(keys.shared(at(32), 4096), None);
        assert_eq!(keys.shared(Hpa::new(0x1001), 4096), None);
        assert_eq!(keys.split(Hpa::new(1 << 52)), None);
    }
}
