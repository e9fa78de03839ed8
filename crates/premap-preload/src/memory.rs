//! From a VM's slots to what the engine is asked to map.
//!
//! A slot says where guest memory lies in this process; what is behind it, and whether it may be touched at all, says the
//! address space. One slot may lie on several areas.
//!
//! | behind the slot | what is done |
//! |---|---|
//! | anonymous, shared, hugetlb | populated as by a write; as by a read in a read-only slot or area |
//! | a private mapping of a file | as by a read: clones of one file go on sharing its pages |
//! | a device's memory, a userfaultfd handler, nothing | left alone |
//!
//! Slots whose dirty pages are logged are left alone (pre-faulting would mark all of them dirty), and so are those with
//! private memory, which the launch of a confidential VM maps in its own way, and those of memory that the guest may be
//! given later (`given`).

use std::ops::Range;

use premap::{Backing, Gpa, GpaRange, Hva, PageSize, Region, Touch};
use serde::Serialize;

use premap_address_space::{Area, Kind};

/// `KVM_MEM_GUEST_MEMFD`
const GUEST_MEMFD: u32 = 1 << 2;

/// A slot as the VMM set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Slot {
    /// The slot's number, with the address space in the upper half.
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
    pub(crate) host: u64,
}

/// What is to be mapped, and what is left alone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    pub(crate) regions: Vec<Region>,
    pub(crate) left: Vec<Left>,
}

/// Guest memory that is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Left {
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
    pub(crate) why: Why,
}

/// Why memory is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Why {
    DirtyLogging,
    PrivateMemory,
    Device,
    Userfault,
    NotMapped,
    /// The slot begins or ends inside a page of its backing.
    CutsPage,
    /// The guest may be given it later, as virtio-mem or a DIMM, or it can't be told that it was given it at its start.
    MaybeHotplug,
}

/// Finds what is behind the slots. Those of system management mode have a second address space and are left out;
/// memory that lies in `pools`, in ascending order, may be given to the guest later, and is left alone.
pub(crate) fn find(slots: impl IntoIterator<Item = Slot>, areas: &[Area], pools: &[Range<u64>]) -> Found {
    let mut found = Found::default();
    let mut slots: Vec<_> = slots.into_iter().filter(|slot| slot.slot >> 16 == 0).collect();
    slots.sort_by_key(|slot| slot.gpa);
    for slot in slots {
        if slot.flags & GUEST_MEMFD != 0 {
            found.leave(&slot, slot.host..slot.host + slot.bytes, Why::PrivateMemory);
        } else if slot.flags & premap_kvm::abi::KVM_MEM_LOG_DIRTY_PAGES != 0 {
            found.leave(&slot, slot.host..slot.host + slot.bytes, Why::DirtyLogging);
        } else {
            let mut at = slot.host;
            for pool in pools.iter().filter(|pool| pool.start < slot.host_range().end && pool.end > slot.host)
            {
                let part = pool.start.max(at)..pool.end.min(slot.host_range().end);
                if part.is_empty() {
                    continue;
                }
                found.look_behind(&slot, at..part.start, areas);
                found.leave(&slot, part.clone(), Why::MaybeHotplug);
                at = part.end;
            }
            found.look_behind(&slot, at..slot.host_range().end, areas);
        }
    }
    found
}

impl Found {
    fn look_behind(&mut self, slot: &Slot, host: Range<u64>, areas: &[Area]) {
        let Range { start, end } = host;
        if start >= end {
            return;
        }
        let mut at = start;
        for area in areas.iter().filter(|area| area.end > start && area.start < end) {
            if area.start > at {
                self.leave(slot, at..area.start, Why::NotMapped);
            }
            let part = at.max(area.start)..end.min(area.end);
            at = part.end;
            self.take(slot, part, area);
        }
        if at < end {
            self.leave(slot, at..end, Why::NotMapped);
        }
    }

    fn take(&mut self, slot: &Slot, part: Range<u64>, area: &Area) {
        let backing = match area.kind {
            Kind::Device => return self.leave(slot, part, Why::Device),
            Kind::Userfault => return self.leave(slot, part, Why::Userfault),
            Kind::Closed => return self.leave(slot, part, Why::NotMapped),
            Kind::Anonymous => Backing::Anonymous,
            Kind::Shared | Kind::SharedFile => Backing::Shared,
            Kind::PrivateFile => Backing::PrivateFile,
            Kind::Hugetlb(bytes) => match page_size(bytes) {
                Some(size) => Backing::Hugetlb(size),
                None => return self.leave(slot, part, Why::CutsPage),
            },
        };
        let (gpa, bytes) = (slot.gpa_of(part.start), part.end - part.start);
        let unit = if let Kind::Hugetlb(bytes) = area.kind { bytes } else { premap_address::PAGE_SIZE };
        let whole = [gpa, part.start, bytes].iter().all(|value| value.is_multiple_of(unit));
        let Some(range) = GpaRange::try_new(Gpa::new(gpa), bytes).ok().filter(|_| whole) else {
            return self.leave(slot, part, Why::CutsPage);
        };
        let read_only = slot.flags & premap_kvm::abi::KVM_MEM_READONLY != 0 || !area.writable;
        let touch = if read_only || backing == Backing::PrivateFile { Touch::Read } else { Touch::Write };
        self.regions.push(Region { range, host: Hva::new(part.start), backing, touch });
    }

    fn leave(&mut self, slot: &Slot, part: Range<u64>, why: Why) {
        self.left.push(Left { gpa: slot.gpa_of(part.start), bytes: part.end - part.start, why });
    }
}

impl Slot {
    /// Where its memory lies in this process.
    pub(crate) fn host_range(&self) -> Range<u64> {
        self.host..self.host.saturating_add(self.bytes)
    }

    fn gpa_of(&self, host: u64) -> u64 {
        self.gpa + (host - self.host)
    }
}

fn page_size(bytes: u64) -> Option<PageSize> {
    [PageSize::Size2M, PageSize::Size1G].into_iter().find(|size| size.bytes() == bytes)
}

/// Keeps of `regions` only what `keep` gives for a region's host range.
pub(crate) fn narrow<E>(
    regions: Vec<Region>,
    keep: impl Fn(Range<u64>) -> Result<Vec<Range<u64>>, E>,
) -> Result<Vec<Region>, E> {
    let mut narrowed = Vec::new();
    for region in regions {
        let (host, gpa) = (region.host.raw(), region.range.start().raw());
        for part in keep(host..host + region.range.bytes())? {
            let start = Gpa::new(gpa + (part.start - host));
            if let Ok(range) = GpaRange::try_new(start, part.end - part.start) {
                narrowed.push(Region { range, host: Hva::new(part.start), ..region });
            }
        }
    }
    Ok(narrowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 0x7f00_0000_0000;
    const MIB: u64 = 1 << 20;

    fn slot(gpa: u64, bytes: u64, flags: u32) -> Slot {
        Slot { slot: 0, flags, gpa, bytes, host: HOST }
    }

    fn area(start: u64, end: u64, kind: Kind) -> Area {
        Area {
            start: HOST + start,
            end: HOST + end,
            kind,
            readable: true,
            writable: true,
            shared: kind == Kind::Shared,
            file: None,
            page_bytes: 4096,
        }
    }

    #[track_caller]
    fn check(slot: Slot, areas: &[Area], regions: &[(u64, u64, Backing, Touch)], left: &[(u64, u64, Why)]) {
        let found = find([slot], areas, &[]);
        let got: Vec<_> = found
            .regions
            .iter()
            .map(|one| (one.range.start().raw(), one.range.bytes(), one.backing, one.touch))
            .collect();
        assert_eq!(got, regions);
        let got: Vec<_> = found.left.iter().map(|one| (one.gpa, one.bytes, one.why)).collect();
        assert_eq!(got, left);
    }

    #[test]
    fn a_slot_takes_what_lies_behind_it() {
        let all = |kind| [area(0, 64 * MIB, kind)];
        let ram = slot(MIB, 4 * MIB, 0);
        check(ram, &all(Kind::Anonymous), &[(MIB, 4 * MIB, Backing::Anonymous, Touch::Write)], &[]);
        check(ram, &all(Kind::Shared), &[(MIB, 4 * MIB, Backing::Shared, Touch::Write)], &[]);
        check(ram, &all(Kind::PrivateFile), &[(MIB, 4 * MIB, Backing::PrivateFile, Touch::Read)], &[]);
        check(ram, &all(Kind::Device), &[], &[(MIB, 4 * MIB, Why::Device)]);
        check(ram, &all(Kind::Userfault), &[], &[(MIB, 4 * MIB, Why::Userfault)]);
        check(ram, &all(Kind::Closed), &[], &[(MIB, 4 * MIB, Why::NotMapped)]);
        check(ram, &[], &[], &[(MIB, 4 * MIB, Why::NotMapped)]);
    }

    #[test]
    fn read_only_slots_and_areas_are_read() {
        let rom = slot(0, MIB, premap_kvm::abi::KVM_MEM_READONLY);
        let expected = [(0, MIB, Backing::Anonymous, Touch::Read)];
        check(rom, &[area(0, MIB, Kind::Anonymous)], &expected, &[]);
        let read_only = Area { writable: false, ..area(0, MIB, Kind::Anonymous) };
        check(slot(0, MIB, 0), &[read_only], &expected, &[]);
    }

    #[test]
    fn logged_private_and_management_mode_slots_are_left_alone() {
        let areas = [area(0, MIB, Kind::Anonymous)];
        check(slot(0, MIB, 1), &areas, &[], &[(0, MIB, Why::DirtyLogging)]);
        check(slot(0, MIB, 4), &areas, &[], &[(0, MIB, Why::PrivateMemory)]);
        check(Slot { slot: 1 << 16, ..slot(0, MIB, 0) }, &areas, &[], &[]);
    }

    #[test]
    fn a_slot_in_a_pool_is_left_alone_however_it_is_cut() {
        let areas = [area(0, 8 * MIB, Kind::Anonymous)];
        let pool = HOST + 4 * MIB..HOST + 8 * MIB;
        for (offset, pooled) in [(0, false), (4 * MIB, true), (6 * MIB, true)] {
            let slot = Slot { host: HOST + offset, ..slot(0, 2 * MIB, 0) };
            let found = find([slot], &areas, std::slice::from_ref(&pool));
            let left: Vec<_> = found.left.iter().map(|left| (left.bytes, left.why)).collect();
            assert_eq!(left, if pooled { vec![(2 * MIB, Why::MaybeHotplug)] } else { vec![] });
            assert_eq!(found.regions.is_empty(), pooled);
        }
    }

    #[test]
    fn of_a_slot_that_is_a_pool_in_part_the_rest_is_taken() {
        let areas = [area(0, 8 * MIB, Kind::Anonymous)];
        let pools = [HOST + MIB..HOST + 2 * MIB, HOST + 3 * MIB..HOST + 9 * MIB];
        let found = find([slot(16 * MIB, 4 * MIB, 0)], &areas, &pools);
        let regions: Vec<_> = found
            .regions
            .iter()
            .map(|one| (one.range.start().raw(), one.host.raw(), one.range.bytes()))
            .collect();
        assert_eq!(regions, [(16 * MIB, HOST, MIB), (18 * MIB, HOST + 2 * MIB, MIB)]);
        let left: Vec<_> = found.left.iter().map(|left| (left.gpa, left.bytes)).collect();
        assert_eq!(left, [(17 * MIB, MIB), (19 * MIB, MIB)]);
    }

    #[test]
    fn areas_with_gaps_give_parts_with_gaps() {
        let areas = [area(0, MIB, Kind::Anonymous), area(2 * MIB, 3 * MIB, Kind::Shared)];
        check(
            slot(16 * MIB, 4 * MIB, 0),
            &areas,
            &[
                (16 * MIB, MIB, Backing::Anonymous, Touch::Write),
                (18 * MIB, MIB, Backing::Shared, Touch::Write),
            ],
            &[(17 * MIB, MIB, Why::NotMapped), (19 * MIB, MIB, Why::NotMapped)],
        );
    }

    #[test]
    fn hugetlb_needs_whole_pages() {
        let areas = [area(0, 8 * MIB, Kind::Hugetlb(2 * MIB))];
        let huge = Backing::Hugetlb(PageSize::Size2M);
        check(slot(2 * MIB, 4 * MIB, 0), &areas, &[(2 * MIB, 4 * MIB, huge, Touch::Write)], &[]);
        check(slot(MIB, 4 * MIB, 0), &areas, &[], &[(MIB, 4 * MIB, Why::CutsPage)]);
    }

    #[test]
    fn narrowing_keeps_gpa_and_host_together() {
        let found = find([slot(16 * MIB, 4 * MIB, 0)], &[area(0, 8 * MIB, Kind::Anonymous)], &[]);
        let keep = |range: Range<u64>| {
            Ok::<_, ()>(vec![range.start + 4096..range.start + 8192, range.end - 4096..range.end])
        };
        let narrowed = narrow(found.regions, keep).unwrap();
        let got: Vec<_> =
            narrowed.iter().map(|one| (one.range.start().raw(), one.host.raw(), one.range.bytes())).collect();
        assert_eq!(
            got,
            [(16 * MIB + 4096, HOST + 4096, 4096), (20 * MIB - 4096, HOST + 4 * MIB - 4096, 4096)]
        );
    }
}
