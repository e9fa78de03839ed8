//! What must hold at any moment at which no call is under way.

use std::collections::BTreeMap;

use premap_tdx_module::{EntryState, Gpa, Hpa, Level, PageInfo, PageRecord, PageType, Pfn};

use super::{Model, PAGES, TDMR, TDS};

impl Model {
    /// What every page is by the Secure-EPTs, held against the PAMT; and the counts.
    pub(crate) fn check(&self) {
        let mut pages: BTreeMap<(Pfn, PageKind), u64> = BTreeMap::new();
        for frame in TDMR >> 12..(TDMR >> 12) + PAGES {
            let record = self.record(Pfn::new(frame));
            if let Some(owner) = record.owner {
                assert_eq!(self.record(owner).kind, PageType::Tdr);
                *pages.entry((owner, record.kind as u8)).or_default() += 1;
            }
        }
        for td in 0..TDS {
            let tdr = Self::tdr(td);
            let Ok(children) = self.module.child_count(tdr) else { continue };
            let of = |kind| pages.get(&(tdr.frame(), kind as PageKind)).copied().unwrap_or_default();
            let kinds = [PageType::Regular, PageType::Tdcx, PageType::Tdvpr, PageType::SecureEpt];
            assert_eq!(
                children,
                kinds.map(|kind| of(kind as PageKind)).into_iter().sum(),
                "child count of {tdr}"
            );
            let mut reached = Reached::default();
            // Of each upper table two slots are ever used, at most.
            if !(0..2_u64).all(|slot| self.reach(tdr, slot << 39, Level::PML4, &mut reached)) {
                continue;
            }
            let (tables, mapped) = (of(PageType::SecureEpt as PageKind), of(PageType::Regular as PageKind));
            if reached.hidden {
                assert!(reached.tables <= tables && reached.mapped <= mapped);
            } else {
                assert_eq!(
                    (reached.tables, reached.mapped),
                    (tables, mapped),
                    "no page is lost or mapped twice"
                );
            }
        }
    }

    fn record(&self, frame: Pfn) -> PageRecord {
        self.module.page_record(frame).expect("a page of the TDMR")
    }

    /// Goes through the entries from one on, and holds each page against its record. `false` if the TD can't be read.
    fn reach(&self, tdr: Hpa, gpa: u64, level: Level, reached: &mut Reached) -> bool {
        let Ok(entry) = self.module.mem_sept_rd(PageInfo::new(Gpa::new(gpa), level), tdr) else {
            return false;
        };
        let frame = Hpa::new(entry.entry & 0x000f_ffff_ffff_f000).frame();
        let check = |frame: Pfn, kind, level| {
            let expected = PageRecord { kind, level, owner: Some(tdr.frame()) };
            assert_eq!(self.record(frame), expected, "{frame:?} at {gpa:#x}");
        };
        match entry.state {
            EntryState::Free | EntryState::Removed => {}
            EntryState::NonLeafBlocked => {
                check(frame, PageType::SecureEpt, Level::PT);
                reached.tables += 1;
                reached.hidden = true;
            }
            EntryState::NonLeafMapped => {
                check(frame, PageType::SecureEpt, Level::PT);
                reached.tables += 1;
                let below = level.below().expect("a table is below");
                let slots = match below {
                    Level::PDPT => 1,
                    Level::PD => 2,
                    _ => 512,
                };
                return (0..slots).all(|slot| self.reach(tdr, gpa + slot * below.bytes(), below, reached));
            }
            _ => {
                (0..level.pages()).for_each(|part| {
                    check(frame.checked_add(part).expect("no wrap"), PageType::Regular, level);
                });
                reached.mapped += level.pages();
            }
        }
        true
    }
}

/// A [`PageType`], as something with an order.
type PageKind = u8;

/// What was found by going through a Secure-EPT.
#[derive(Debug, Default)]
struct Reached {
    tables: u64,
    mapped: u64,
    /// A blocked table hides what is below.
    hidden: bool,
}
