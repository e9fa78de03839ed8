//! The host's answers about memory that is prepared in each way it can be, by both interfaces.
// UNSAFETY: maps anonymous memory, of which only the kernel is told.
#![expect(unsafe_code, reason = "mmap")]

use std::ffi::c_void;
use std::ptr;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

use super::*;

const PAGES: u64 = 16;

struct Area(*mut c_void);

impl Area {
    fn new(flags: MapFlags) -> Self {
        let bytes = usize::try_from(PAGES * PAGE_SIZE).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice, on which no reference is ever made.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags) };
        let area = Self(start.unwrap());
        area.advise(0..PAGES, Advice::LinuxNoHugepage);
        area
    }

    fn range(&self, pages: Range<u64>) -> Range<Hva> {
        let start = Hva::new(self.0.addr() as u64);
        start.wrapping_add(pages.start * PAGE_SIZE)..start.wrapping_add(pages.end * PAGE_SIZE)
    }

    fn part(&self, pages: &Range<u64>) -> (*mut c_void, usize) {
        let bytes = |pages: u64| usize::try_from(pages * PAGE_SIZE).unwrap();
        (self.0.wrapping_byte_add(bytes(pages.start)), bytes(pages.end - pages.start))
    }

    fn advise(&self, pages: Range<u64>, advice: Advice) {
        let (start, bytes) = self.part(&pages);
        // SAFETY: the area is ours and holds nothing.
        unsafe { madvise(start, bytes, advice) }.unwrap();
    }

    fn protect(&self, pages: Range<u64>, protection: MprotectFlags) {
        let (start, bytes) = self.part(&pages);
        // SAFETY: as in `advise`.
        unsafe { mprotect(start, bytes, protection) }.unwrap();
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let (start, bytes) = self.part(&(0..PAGES));
        // SAFETY: as in `advise`; it is not used after this.
        unsafe { munmap(start, bytes) }.unwrap();
    }
}

/// Asks by each interface and compares the states of the pages; an answer may end before the range does.
#[track_caller]
fn check(area: &Area, asked: Range<u64>, expected: &[(u64, State)]) {
    let host = AddressSpace::open().unwrap();
    for scan in [true, false] {
        host.pages.use_scan(scan);
        for exclusivity in [Exclusivity::Assume, Exclusivity::Ask] {
            let mut runs = Vec::new();
            host.query(area.range(asked.clone()), exclusivity, &mut runs).unwrap();
            let mut found: Vec<(u64, State)> = Vec::new();
            let mut at = area.range(asked.clone()).start;
            for run in runs {
                assert_eq!(run.start, at, "gap");
                assert_eq!(run.size, PageSize::Size4K);
                at = at.wrapping_add(run.pages * PAGE_SIZE);
                match found.last_mut() {
                    Some((pages, state)) if *state == run.state => *pages += run.pages,
                    _ => found.push((run.pages, run.state)),
                }
            }
            assert_eq!(found, expected, "scan {scan}, {exclusivity:?}");
        }
    }
}

#[test]
fn private_memory_is_absent_then_zero_then_ours() {
    let area = Area::new(MapFlags::PRIVATE);
    check(&area, 0..PAGES, &[(PAGES, State::Absent)]);
    area.advise(2..6, Advice::LinuxPopulateRead);
    area.advise(6..9, Advice::LinuxPopulateWrite);
    check(
        &area,
        0..PAGES,
        &[(2, State::Absent), (4, State::Readable), (3, State::Writable), (7, State::Absent)],
    );
    check(&area, 5..7, &[(1, State::Readable), (1, State::Writable)]);
    area.advise(0..PAGES, Advice::LinuxPopulateWrite);
    check(&area, 0..PAGES, &[(PAGES, State::Writable)]);
    area.advise(0..PAGES, Advice::LinuxDontNeed);
    check(&area, 0..PAGES, &[(PAGES, State::Absent)]);
}

#[test]
fn shared_memory_is_writable_once_it_is_there() {
    let area = Area::new(MapFlags::SHARED);
    area.advise(0..4, Advice::LinuxPopulateRead);
    check(&area, 0..PAGES, &[(4, State::Writable), (12, State::Absent)]);
}

#[test]
fn permissions_come_before_pages_and_end_an_answer() {
    let area = Area::new(MapFlags::PRIVATE);
    area.advise(0..PAGES, Advice::LinuxPopulateWrite);
    area.protect(4..8, MprotectFlags::READ);
    area.protect(8..12, MprotectFlags::empty());
    check(&area, 0..PAGES, &[(4, State::Writable)]);
    check(&area, 4..PAGES, &[(4, State::Readable)]);
    check(&area, 8..PAGES, &[(4, State::NoAccess)]);
    let host = AddressSpace::open().unwrap();
    assert_eq!(host.may_write(area.range(4..5).start), Ok(false));
    assert_eq!(host.may_write(area.range(0..1).start), Ok(true));
}

#[test]
fn scattered_pages_and_no_mapping_at_all_are_told() {
    let host = AddressSpace::open().unwrap();
    let area = Area::new(MapFlags::PRIVATE);
    for page in (0..PAGES).step_by(2) {
        area.advise(page..page + 1, Advice::LinuxPopulateWrite);
    }
    let expected: Vec<_> =
        (0..PAGES).map(|page| (1, if page % 2 == 0 { State::Writable } else { State::Absent })).collect();
    check(&area, 0..PAGES, &expected);
    let mut runs = Vec::new();
    host.query(Hva::new(0)..Hva::new(PAGE_SIZE), Exclusivity::Assume, &mut runs).unwrap();
    assert_eq!(runs.first().map(|run| run.state), Some(State::NoAccess), "nothing is mapped at 0");
}
