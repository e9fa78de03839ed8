//! Plans that fit and plans that don't, on memory of the test's own.
// UNSAFETY: maps memory of its own, on which no reference is ever made.
#![expect(unsafe_code, reason = "mmap")]

use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt;

use premap_address::{Gpa, GpaRange, Hva, PageSize};
use premap_address_space::limits::LimitKind;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::*;
use crate::report::Report;

const MIB: u64 = 1 << 20;
/// What a cgroup of `spare` bytes leaves, margin included.
fn limit(kind: LimitKind, spare: u64) -> Limit {
    let limit = Limit { kind, path: Some("/cg/memory.max".into()), bytes: 64 * MIB, left: 0 };
    Limit { left: spare + limit.margin(), ..limit }
}

/// Memory of which nothing is mapped yet.
struct Area(*mut c_void, usize, Backing);

impl Area {
    fn new(bytes: u64) -> Self {
        let len = usize::try_from(bytes).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let area = Self(start.unwrap(), len, Backing::Anonymous);
        // SAFETY: the area is the test's own. Huge pages would make more present than is asked for.
        unsafe { madvise(area.0, len, Advice::LinuxNoHugepage) }.unwrap();
        area
    }

    /// Shared memory of which somebody has filled a part.
    fn filled(bytes: u64, part: Range<u64>) -> Self {
        let len = usize::try_from(bytes).unwrap();
        let file = File::from(memfd_create("premap-fit", MemfdFlags::empty()).unwrap());
        file.set_len(bytes).unwrap();
        file.write_all_at(&vec![1; usize::try_from(part.end - part.start).unwrap()], part.start).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, &file, 0) };
        Self(start.unwrap(), len, Backing::Shared)
    }

    /// Makes a part present, and says whether the kernel can tell so.
    fn populate(&self, part: Range<u64>) -> bool {
        let (start, len) =
            (usize::try_from(part.start).unwrap(), usize::try_from(part.end - part.start).unwrap());
        // SAFETY: populating changes no content.
        unsafe { madvise(self.0.wrapping_byte_add(start), len, Advice::LinuxPopulateWrite) }.unwrap();
        let start = self.0.addr() as u64 + part.start;
        let told = present(start..start + 4096);
        told.inspect_err(|errno| eprintln!("skipped: this kernel has no PAGEMAP_SCAN: {errno}")).is_ok()
    }

    fn piece(&self, touch: Touch) -> Piece {
        let range = GpaRange::new(Gpa::new(1 << 32), self.1 as u64);
        let host = Hva::new(self.0.addr() as u64);
        Piece { place: 3, region: Region { range, host, backing: self.2, touch } }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is the test's own and nothing refers to it any more.
        unsafe { munmap(self.0, self.1) }.unwrap();
    }
}

/// Fits pieces, of any backing, within the limits.
fn fitted(
    pieces: &[Piece],
    within: HostMemory,
    limit: impl Fn(Pages) -> Option<Limit>,
    lost: &mut Tally,
) -> Fitted {
    let mappings = Mappings::read(Stages::Both, 0);
    let candidates = pieces.iter().map(|piece| Candidate::new(*piece, Stages::Both, &mappings)).collect();
    fit(candidates, Stages::Both, within, &mappings, limit, lost)
}

/// Fits a plan into a room, and gives the parts kept in MiB from the area's start, and the report of what was lost.
#[track_caller]
fn check(pieces: &[Piece], within: HostMemory, spare: u64, expected: &[(u64, u64)]) -> Report {
    let mut lost = Tally::default();
    let room = |_| Some(limit(LimitKind::Cgroup, spare));
    let kept = fitted(pieces, within, room, &mut lost).pieces;
    let base = pieces[0].region;
    let parts: Vec<_> = kept
        .iter()
        .map(|piece| {
            let at = piece.region.range.start().raw() - base.range.start().raw();
            assert_eq!(piece.region.host.raw() - base.host.raw(), at, "both sides are cut alike");
            (at / MIB, piece.region.range.bytes() / MIB)
        })
        .collect();
    assert_eq!(parts, expected);
    let mut report = Report::default();
    lost.write(&mut report);
    let all = |pieces: &[Piece]| pieces.iter().map(|piece| piece.region.range.bytes()).sum::<u64>();
    assert_eq!(report.host.bytes(), all(pieces) - all(&kept), "every byte is kept or lost");
    assert_eq!(report.second.bytes(), report.host.bytes());
    assert_eq!(report.host.abandoned, report.host.bytes(), "it is worth another try");
    report
}

#[test]
fn a_plan_that_fits_is_kept_whole_and_nothing_is_said() {
    let area = Area::new(16 * MIB);
    let report = check(&[area.piece(Touch::Write)], HostMemory::Whole, 17 * MIB, &[(0, 16)]);
    assert_eq!(report, Report::default());
    // Its page tables have to fit too.
    check(&[area.piece(Touch::Write)], HostMemory::Whole, 16 * MIB, &[]);
}

#[test]
fn of_a_plan_without_order_that_does_not_fit_only_present_memory_is_kept() {
    let area = Area::new(16 * MIB);
    if !area.populate(4 * MIB..6 * MIB) || !area.populate(15 * MIB..16 * MIB) {
        return;
    }
    let report = check(&[area.piece(Touch::Write)], HostMemory::Whole, 8 * MIB, &[(4, 2), (15, 1)]);
    assert_eq!(report.unmapped[0].reason, Reason::HostMemory(LimitKind::Cgroup));
    assert_eq!(report.limit.as_deref(), Some("the memory limit of cgroup /cg (memory.max, 64 MiB)"));
}

#[test]
fn what_is_present_takes_nothing_more() {
    let area = Area::new(16 * MIB);
    if !area.populate(0..10 * MIB) {
        return;
    }
    check(&[area.piece(Touch::Write)], HostMemory::Whole, 7 * MIB, &[(0, 16)]);
}

#[test]
fn shared_memory_that_somebody_filled_takes_nothing_more() {
    let area = Area::filled(16 * MIB, 4 * MIB..14 * MIB);
    check(&[area.piece(Touch::Write)], HostMemory::Whole, 7 * MIB, &[(0, 16)]);
    check(&[area.piece(Touch::Write)], HostMemory::Whole, 0, &[(4, 10)]);
    let chunk = Chunk::whole(area.piece(Touch::Write).region);
    assert_eq!(absent(&chunk, &Mappings::read(Stages::Both, 0)), 6 * MIB, "in a run as before it");
}

#[test]
fn a_front_is_kept_up_to_where_the_room_ends_and_present_memory_behind_it() {
    let area = Area::new(16 * MIB);
    if !area.populate(2 * MIB..4 * MIB) || !area.populate(12 * MIB..13 * MIB) {
        return;
    }
    let room = 4 * MIB + 4 * MIB / TABLES;
    let report = check(&[area.piece(Touch::Write)], HostMemory::Front, room, &[(0, 6), (12, 1)]);
    assert_eq!(report.host.abandoned, 9 * MIB);
}

#[test]
fn a_limit_of_the_caller_s_own_is_a_budget_unless_the_host_has_less() {
    let area = Area::new(16 * MIB);
    let bytes = |mib: u64| mib * MIB + mib * MIB / TABLES;
    let report = check(&[area.piece(Touch::Write)], HostMemory::UpTo(bytes(3)), bytes(20), &[(0, 3)]);
    assert_eq!((report.unmapped[0].reason, report.limit), (Reason::Budget, None));
    let report = check(&[area.piece(Touch::Write)], HostMemory::UpTo(bytes(9)), bytes(5), &[(0, 5)]);
    assert_eq!(report.unmapped[0].reason, Reason::HostMemory(LimitKind::Cgroup));
}

#[test]
fn reading_private_memory_takes_nothing() {
    let area = Area::new(16 * MIB);
    check(&[area.piece(Touch::Read)], HostMemory::Whole, 0, &[(0, 16)]);
}

#[test]
fn hugetlb_is_counted_against_its_own_pages_and_cut_on_them() {
    let huge = 2 * MIB;
    let range = GpaRange::new(Gpa::new(0), 8 * huge);
    let backing = Backing::Hugetlb(PageSize::Size2M);
    let region = Region { range, host: Hva::new(huge), backing, touch: Touch::Write };
    let area = Area::new(4 * MIB);
    let pieces = [Piece { place: 0, region }, area.piece(Touch::Write)];
    let room = |pages| match pages {
        Pages::Ordinary => Some(limit(LimitKind::Available, 5 * MIB)),
        Pages::Hugetlb(_) => Some(limit(LimitKind::HugetlbPool, 3 * huge)),
    };
    let mut lost = Tally::default();
    let kept = fitted(&pieces, HostMemory::Front, room, &mut lost).pieces;
    let bytes: Vec<_> = kept.iter().map(|piece| piece.region.range.bytes()).collect();
    assert_eq!(bytes, [3 * huge, 4 * MIB]);
    let mut report = Report::default();
    lost.write(&mut report);
    assert_eq!(report.unmapped[0].reason, Reason::HostMemory(LimitKind::HugetlbPool));
}

#[test]
fn without_limits_everything_fits() {
    let area = Area::new(4 * MIB);
    let mut lost = Tally::default();
    let pieces = [area.piece(Touch::Write)];
    assert_eq!(fitted(&pieces, HostMemory::Whole, |_| None, &mut lost).pieces, pieces);
}

#[test]
fn memory_scattered_more_widely_than_is_worth_telling_is_lost_by_region() {
    let pages = 4 * MOST_STRETCHES as u64;
    let area = Area::new(pages * 4096);
    for page in (0..pages).step_by(2) {
        area.populate(page * 4096..(page + 1) * 4096);
    }
    let mut lost = Tally::default();
    let room = |_| Some(limit(LimitKind::Cgroup, 0));
    let kept = fitted(&[area.piece(Touch::Write)], HostMemory::Whole, room, &mut lost);
    assert!(!kept.needs_ordinary, "it has them already");
    let kept = kept.pieces;
    assert!(kept.len() <= MOST_STRETCHES, "{}", kept.len());
    let mut report = Report::default();
    lost.write(&mut report);
    let kept: u64 = kept.iter().map(|piece| piece.region.range.bytes()).sum();
    assert_eq!(kept + report.host.abandoned, pages * 4096);
}
