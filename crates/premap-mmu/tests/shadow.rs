//! Shadow paging over a guest that writes its own tables.

use std::cell::RefCell;
use std::collections::BTreeMap;

use premap_mmu::shadow::{
    Demand, Filled, GuestFault, GuestMemory, More, ShadowFault, ShadowMmu, ShadowRoot, Source, Tag,
};
use premap_mmu::{Access, Arena, Ept, Gfn, Gpa, Levels, PAGE_SIZE, Permissions, Pfn, Present};

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
/// Where the guest's frames lie in the host.
const HOST: u64 = 0x10_0000;

/// Guest memory: words, all frames of it mapped writable but those named.
#[derive(Default)]
struct Guest {
    words: RefCell<BTreeMap<u64, u64>>,
    read_only: Vec<u64>,
}

impl GuestMemory for Guest {
    fn read(&self, gpa: Gpa) -> Option<u64> {
        Some(self.words.borrow().get(&gpa.raw()).copied().unwrap_or(0))
    }

    fn exchange(&self, gpa: Gpa, old: u64, new: u64) -> bool {
        let same = self.read(gpa) == Some(old);
        if same {
            self.words.borrow_mut().insert(gpa.raw(), new);
        }
        same
    }

    fn translate(&self, gfn: Gfn, _: Access) -> Option<(Pfn, bool)> {
        let writable = !self.read_only.contains(&gfn.number());
        (gfn.number() < 0x1000).then_some((Pfn::new(HOST + gfn.number()), writable))
    }
}

impl Guest {
    /// Writes the entry for an address in a table of a level.
    fn set(&self, table: u64, level: u32, address: u64, entry: u64) -> Gpa {
        let gpa = table * PAGE_SIZE + (address >> (12 + 9 * (level - 1)) & 511) * 8;
        self.words.borrow_mut().insert(gpa, entry);
        Gpa::new(gpa)
    }

    /// Root in frame 1, tables in 2 to 4, mapping address `page * 4096` to frame 16 + page for a few pages.
    fn with_pages(pages: u64) -> Self {
        let guest = Self::default();
        for (table, level, below) in [(1, 4, 2), (2, 3, 3), (3, 2, 4)] {
            guest.set(table, level, 0, (below * PAGE_SIZE) | PRESENT | WRITE);
        }
        for page in 0..pages {
            guest.set(4, 1, page * PAGE_SIZE, ((16 + page) * PAGE_SIZE) | PRESENT | WRITE);
        }
        guest
    }
}

const MAPPED: Filled = Filled::Mapped(Permissions::ALL);
const READ_ONLY: Filled = Filled::Mapped(Permissions::READ_EXECUTE);

type Shadow<'a> = ShadowMmu<Ept, &'a Arena>;

fn root(shadow: &Shadow<'_>) -> ShadowRoot {
    root_of(shadow, Source::Table(Gfn::new(1)), Tag(0))
}

fn root_of(shadow: &Shadow<'_>, source: Source, tag: Tag) -> ShadowRoot {
    let (root, zap) = shadow.root(source, tag).expect("a page");
    zap.complete(|| ());
    root
}

fn frames(frames: std::ops::Range<u64>) -> std::ops::Range<Gfn> {
    Gfn::new(frames.start)..Gfn::new(frames.end)
}

/// Handles a fault to its end: until no table that is newly tracked is in the way.
fn fault(
    shadow: &Shadow<'_>,
    guest: &Guest,
    root: ShadowRoot,
    address: u64,
    access: Access,
) -> Result<Filled, ShadowFault> {
    demand(shadow, guest, root, address, Demand::Access(access))
}

fn demand(
    shadow: &Shadow<'_>,
    guest: &Guest,
    root: ShadowRoot,
    address: u64,
    demand: Demand,
) -> Result<Filled, ShadowFault> {
    loop {
        let (result, zap) = match shadow.fault(root, Gpa::new(address), demand, guest) {
            Ok((filled, zap)) => (Ok(filled), zap),
            Err((fault, zap)) => (Err(fault), zap),
        };
        let tracked = zap.tracked().len();
        zap.complete(|| ());
        if result != Ok(Filled::Again) {
            return result;
        }
        assert_eq!(tracked, 1, "again for one table at a time");
    }
}

fn frame(shadow: &Shadow<'_>, root: ShadowRoot, address: u64, access: Access) -> Option<u64> {
    shadow.access(root, Gpa::new(address), access).map(|leaf| leaf.pfn.number())
}

#[test]
fn the_shadow_follows_the_guests_tables_and_notes_use_in_them() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    assert_eq!(frame(&shadow, root, 0x2000, Access::Read), None);
    assert_eq!(fault(&shadow, &guest, root, 0x2000, Access::Read), Ok(READ_ONLY));
    assert_eq!(frame(&shadow, root, 0x2000, Access::Read), Some(HOST + 18));
    // Not dirty in the guest's entry yet, so a write comes again.
    assert_eq!(frame(&shadow, root, 0x2000, Access::Write), None);
    let entry = || guest.read(Gpa::new(4 * PAGE_SIZE + 16)).expect("memory");
    assert_eq!(entry() & DIRTY, 0);
    assert_eq!(fault(&shadow, &guest, root, 0x2000, Access::Write), Ok(MAPPED));
    assert_ne!(entry() & DIRTY, 0);
    assert_eq!(frame(&shadow, root, 0x2000, Access::Write), Some(HOST + 18));
    assert_eq!(shadow.pages(), 4);
    let absent = fault(&shadow, &guest, root, 0x9000, Access::Read);
    assert_eq!(absent, Err(ShadowFault::Guest(GuestFault::NotPresent(1))));
}

#[test]
fn what_the_guest_or_the_host_forbids_stays_forbidden() {
    let (arena, mut guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    guest.set(4, 1, 0, (16 * PAGE_SIZE) | PRESENT);
    guest.read_only.push(17);
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    let denied = fault(&shadow, &guest, root, 0, Access::Write);
    assert_eq!(denied, Err(ShadowFault::Guest(GuestFault::NotPermitted)));
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Write), Err(ShadowFault::NoFrame(Gfn::new(17))));
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Read), Ok(READ_ONLY));
    assert_eq!(frame(&shadow, root, 0x1000, Access::Write), None);
}

#[test]
fn writes_to_shadowed_tables_come_to_the_caller_and_take_what_was_built() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    // The guest maps its own leaf table, frame 4, at page 3.
    let own = guest.set(4, 1, 0x3000, (4 * PAGE_SIZE) | PRESENT | WRITE | DIRTY);
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Write), Ok(MAPPED));
    assert!(shadow.is_tracked(Gfn::new(4)) && !shadow.is_tracked(Gfn::new(17)));
    assert_eq!(fault(&shadow, &guest, root, 0x3000, Access::Read), Ok(READ_ONLY));
    assert_eq!(frame(&shadow, root, 0x3000, Access::Write), None, "a tracked frame is read-only");
    let write = fault(&shadow, &guest, root, 0x3008, Access::Write);
    assert_eq!(write, Ok(Filled::Emulate(Gpa::new(4 * PAGE_SIZE + 8))));
    // The guest moves page 1 to another frame.
    let entry = guest.set(4, 1, 0x1000, (99 * PAGE_SIZE) | PRESENT | WRITE);
    let zap = shadow.written(entry);
    assert_eq!((zap.leaves(), zap.pages(), zap.is_owed()), (1, 0, true));
    zap.complete(|| ());
    assert_eq!(frame(&shadow, root, 0x1000, Access::Read), None);
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Read), Ok(READ_ONLY));
    assert_eq!(frame(&shadow, root, 0x1000, Access::Read), Some(HOST + 99));
    // A table that is only ever written is one no more.
    for _ in 0..3 {
        shadow.written(own).complete(|| ());
    }
    assert!(!shadow.is_tracked(Gfn::new(4)));
}

#[test]
fn a_frame_that_becomes_a_table_loses_its_writable_mappings() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    assert_eq!(fault(&shadow, &guest, root, 0x2000, Access::Write), Ok(MAPPED));
    // Frame 18 becomes the leaf table of the next 2 MiB.
    guest.set(3, 2, 2 << 20, (18 * PAGE_SIZE) | PRESENT | WRITE);
    guest.set(18, 1, 2 << 20, (50 * PAGE_SIZE) | PRESENT | WRITE);
    assert_eq!(fault(&shadow, &guest, root, 2 << 20, Access::Read), Ok(READ_ONLY));
    assert_eq!(frame(&shadow, root, 2 << 20, Access::Read), Some(HOST + 50));
    assert_eq!(frame(&shadow, root, 0x2000, Access::Write), None);
    assert_eq!(frame(&shadow, root, 0x2000, Access::Read), Some(HOST + 18));
}

#[test]
fn a_large_leaf_of_the_guest_is_broken_up() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(1));
    guest.set(3, 2, 4 << 20, (512 * PAGE_SIZE) | PRESENT | WRITE | LARGE);
    guest.set(2, 3, 1 << 30, PRESENT | WRITE | LARGE);
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    for (address, gfn) in [((4 << 20) + 0x5000, 512 + 5), ((1 << 30) + (2 << 20), 512)] {
        assert_eq!(fault(&shadow, &guest, root, address, Access::Write), Ok(MAPPED));
        let leaf = shadow.access(root, Gpa::new(address), Access::Write).expect("mapped");
        assert_eq!((leaf.pfn, leaf.attributes.permissions), (Pfn::new(HOST + gfn), Permissions::ALL));
    }
    // Both lead to frame 512 and on with the same permissions, so they share a page, and its leaf goes for both.
    assert_eq!(frame(&shadow, root, 4 << 20, Access::Read), Some(HOST + 512));
    let zap = shadow.unmap(frames(512..513), |_| true);
    assert_eq!((zap.leaves(), zap.pages()), (1, 0));
    zap.complete(|| ());
    for address in [4 << 20, (1 << 30) + (2 << 20)] {
        assert_eq!(frame(&shadow, root, address, Access::Read), None);
    }
}

#[test]
fn the_oldest_pages_go_when_the_limit_is_reached_and_roots_stay() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(2));
    for block in 1..6 {
        guest.set(3, 2, block << 21, ((10 + block) * PAGE_SIZE) | PRESENT | WRITE);
        guest.set(10 + block, 1, block << 21, ((60 + block) * PAGE_SIZE) | PRESENT | WRITE);
    }
    let shadow = Shadow::new(&arena, 6);
    let root = root(&shadow);
    for block in 0..6 {
        assert_eq!(fault(&shadow, &guest, root, block << 21, Access::Read), Ok(READ_ONLY));
        assert!(shadow.pages() <= 6);
    }
    assert_eq!(frame(&shadow, root, 0, Access::Read), None, "the oldest leaf table went");
    assert_eq!(frame(&shadow, root, 5 << 21, Access::Read), Some(HOST + 65));
    // With room for roots alone nothing can go.
    let tiny = Shadow::new(&arena, 2);
    let [first, _second] = [1, 2].map(|table| root_of(&tiny, Source::Table(Gfn::new(table)), Tag(0)));
    assert_eq!(fault(&tiny, &guest, first, 0, Access::Read), Err(ShadowFault::OutOfPages));
}

#[test]
fn a_new_generation_makes_all_obsolete_and_batches_zap_it() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    {
        let shadow = Shadow::new(&arena, 32);
        let old = root(&shadow);
        assert_eq!(fault(&shadow, &guest, old, 0, Access::Read), Ok(READ_ONLY));
        shadow.invalidate_all();
        assert!(shadow.is_obsolete(old));
        assert_eq!(fault(&shadow, &guest, old, 0, Access::Read), Err(ShadowFault::Obsolete));
        let new = root(&shadow);
        assert_eq!(fault(&shadow, &guest, new, 0, Access::Read), Ok(READ_ONLY));
        let mut batches = 0;
        loop {
            let (zap, more) = shadow.zap_obsolete(2);
            batches += usize::from(zap.pages() > 0);
            zap.complete(|| ());
            if more == More::None {
                break;
            }
        }
        assert_eq!((batches, shadow.pages()), (1, 5), "its vCPU holds the old root still");
        shadow.release(old).complete(|| ());
        assert_eq!(shadow.pages(), 4);
        assert_eq!(frame(&shadow, new, 0, Access::Read), Some(HOST + 16));
        // The host is short of memory: all but the root goes.
        let zap = shadow.shrink(100);
        assert_eq!(zap.pages(), 3);
        zap.complete(|| ());
        assert_eq!((shadow.pages(), frame(&shadow, new, 0, Access::Read)), (1, None));
        assert_eq!(arena.in_use(), 1);
    }
    assert_eq!(arena.in_use(), 0);
}

#[test]
fn a_direct_root_maps_what_the_host_has_and_a_second_fault_finds_it() {
    let (arena, mut guest) = (Arena::new(64).expect("memory"), Guest::default());
    guest.read_only.push(3);
    for levels in [Levels::Four, Levels::Five] {
        let shadow = Shadow::new(&arena, 32);
        let root = root_of(&shadow, Source::Direct(levels), Tag(0));
        assert_eq!(demand(&shadow, &guest, root, 0x2000, Demand::Ahead(Present::Keep)), Ok(MAPPED));
        let leaf = |page: u64| shadow.lookup(root, Gpa::new(page * PAGE_SIZE)).expect("mapped");
        assert_eq!((leaf(2).pfn, leaf(2).attributes.used.accessed), (Pfn::new(HOST + 2), false));
        assert_eq!(fault(&shadow, &guest, root, 0x2000, Access::Write), Ok(Filled::Spurious));
        assert_eq!(frame(&shadow, root, 0x2000, Access::Write), Some(HOST + 2));
        assert!(leaf(2).attributes.used.accessed);
        for (present, accessed, filled) in
            [(Present::Keep, true, Filled::Spurious), (Present::Rebuild, false, MAPPED)]
        {
            assert_eq!(demand(&shadow, &guest, root, 0x2000, Demand::Ahead(present)), Ok(filled));
            assert_eq!(leaf(2).attributes.used.accessed, accessed);
        }
        assert_eq!(fault(&shadow, &guest, root, 0x3000, Access::Read), Ok(READ_ONLY));
        assert_eq!(shadow.leaves(), 2);
        let pages = if levels == Levels::Five { 5 } else { 4 };
        assert_eq!((shadow.pages(), shadow.tracks_any()), (pages, false), "no table of the guest's");
        shadow.unmap(frames(0..0x1000), |_| true).complete(|| ());
        assert_eq!(shadow.leaves(), 0);
    }
}

#[test]
fn roots_of_two_tags_share_nothing_but_what_is_tracked() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    let shadow = Shadow::new(&arena, 32);
    let [one, two] = [1, 2].map(|tag| root_of(&shadow, Source::Table(Gfn::new(1)), Tag(tag)));
    for root in [one, two] {
        assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Write), Ok(MAPPED));
    }
    assert_eq!((shadow.pages(), shadow.leaves()), (8, 2));
    shadow.unmap(frames(17..18), |tag| tag == Tag(1)).complete(|| ());
    assert_eq!(frame(&shadow, one, 0x1000, Access::Read), None);
    assert_eq!(frame(&shadow, two, 0x1000, Access::Read), Some(HOST + 17));
    shadow.write_protect(frames(17..18), |tag| tag == Tag(1)).complete(|| ());
    assert_eq!(frame(&shadow, two, 0x1000, Access::Write), Some(HOST + 17));
    // The same frame may be the same memory: a write to the table by either concerns both.
    let direct = root_of(&shadow, Source::Direct(Levels::Four), Tag(3));
    let entry = Gpa::new(4 * PAGE_SIZE + 8);
    assert_eq!(
        fault(&shadow, &guest, direct, entry.raw(), Access::Write),
        Ok(Filled::Emulate(entry)),
        "a tracked frame"
    );
    assert_eq!(fault(&shadow, &guest, direct, entry.raw(), Access::Read), Ok(READ_ONLY));
    shadow.written(entry).complete(|| ());
    assert_eq!(frame(&shadow, two, 0x1000, Access::Read), None);
}

#[test]
fn a_table_is_followed_only_after_the_flush_that_began_to_track_it() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    let mut tables = Vec::new();
    loop {
        let (filled, zap) =
            shadow.fault(root, Gpa::new(0x1000), Demand::Access(Access::Read), &guest).expect("no fault");
        tables.extend(zap.tracked().iter().map(|gfn| gfn.number()));
        zap.complete(|| ());
        if filled != Filled::Again {
            break;
        }
        assert_eq!(shadow.leaves(), 0);
        // A write that nobody had to tell: the table was not tracked when it was begun, and is read again.
        guest.set(4, 1, 0x1000, (70 * PAGE_SIZE) | PRESENT | WRITE);
    }
    assert_eq!(tables, [2, 3, 4]);
    assert_eq!(frame(&shadow, root, 0x1000, Access::Read), Some(HOST + 70));
}

#[test]
fn tables_in_memory_that_went_are_forgotten() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::with_pages(4));
    let shadow = Shadow::new(&arena, 32);
    let root = root(&shadow);
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Read), Ok(READ_ONLY));
    shadow.forget_tables(frames(3..5), |_| true).complete(|| ());
    assert!([3, 4].iter().all(|table| !shadow.is_tracked(Gfn::new(*table))));
    assert_eq!((shadow.pages(), shadow.leaves()), (2, 0));
    assert_eq!(fault(&shadow, &guest, root, 0x1000, Access::Read), Ok(READ_ONLY));
}

#[test]
fn a_lower_limit_takes_the_oldest_pages_at_once() {
    let (arena, guest) = (Arena::new(64).expect("memory"), Guest::default());
    let shadow = Shadow::new(&arena, 32);
    let root = root_of(&shadow, Source::Direct(Levels::Four), Tag(0));
    for block in 0..4 {
        assert_eq!(fault(&shadow, &guest, root, block << 21, Access::Read), Ok(MAPPED));
    }
    assert_eq!((shadow.pages(), shadow.leaves()), (7, 4));
    shadow.set_limit(3).complete(|| ());
    // The directory above the leaf tables is older than they are, and takes them along.
    assert_eq!((shadow.pages(), shadow.leaves()), (1, 0));
    assert_eq!(fault(&shadow, &guest, root, 0, Access::Read), Err(ShadowFault::OutOfPages));
    shadow.set_limit(4).complete(|| ());
    assert_eq!(fault(&shadow, &guest, root, 0, Access::Read), Ok(MAPPED));
    shadow.invalidate_all();
    assert_eq!(shadow.pages(), 4);
    shadow.release(root).complete(|| ());
    assert_eq!(shadow.leaves(), 0, "an obsolete root goes with the last that walks from it");
}
