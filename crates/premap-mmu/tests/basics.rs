//! The table's behaviour, one operation at a time.

use premap_mmu::{
    Access, AccessFault, Attributes, Edges, Ept, Format, Gpa, GpaRange, Heap, Leaves, Levels, Npt, Obstacle,
    PAGE_SIZE, PageSize, PageTable, Permissions, Pfn, Present, Use,
};

const MIB: u64 = 1 << 20;

fn table<F: Format>(levels: Levels) -> PageTable<F, Heap> {
    PageTable::new(Heap, levels).expect("the heap has a frame")
}

fn range(gpa: u64, bytes: u64) -> GpaRange {
    GpaRange::new(Gpa::new(gpa), bytes)
}

fn all<F: Format>() -> Attributes<F> {
    Attributes::new(Permissions::ALL)
}

fn map<F: Format>(table: &PageTable<F, Heap>, gpa: u64, bytes: u64, pfn: u64, cap: PageSize) -> Leaves {
    let done = table.map(range(gpa, bytes), Pfn::new(pfn), all(), cap, Present::Keep);
    assert!(done.stopped.is_none() && !done.flush.is_owed(), "{:?}", done.stopped);
    done.mapped
}

fn unmap<F: Format>(table: &PageTable<F, Heap>, gpa: u64, bytes: u64, edges: Edges) -> Leaves {
    let done = table.unmap(range(gpa, bytes), edges);
    assert!(done.stopped.is_none(), "{:?}", done.stopped);
    done.flush.complete(|_| ());
    done.leaves
}

fn uses_the_largest_leaves<F: Format>(levels: Levels) {
    let table = table::<F>(levels);
    let mapped = map(&table, 2 * MIB - PAGE_SIZE, 1024 * MIB, 0x1ff, PageSize::Size1G);
    let expected = Leaves { size_4k: 1 + 511, size_2m: 511, size_1g: 0 };
    assert_eq!((mapped, table.leaves()), (expected, expected));
    let leaf = table.walk(Gpa::new(4 * MIB + 5)).expect("mapped");
    assert_eq!((leaf.page_size, leaf.pfn), (PageSize::Size2M, Pfn::new(0x400)));
    assert_eq!(leaf.translate(Gpa::new(4 * MIB + 5)).expect("inside the leaf").raw(), 0x40_0005);
    assert!(table.walk(Gpa::new(2 * MIB - PAGE_SIZE - 1)).is_none());
    assert!(table.walk(levels.limit()).is_none());
    assert_eq!(unmap(&table, 0, 4096 * MIB, Edges::Whole), expected);
    assert_eq!(table.leaves(), Leaves::NONE);
    assert_eq!(map(&table, 8192 * MIB, 2048 * MIB, 0, PageSize::Size1G), Leaves::of(PageSize::Size1G, 2));
}

#[test]
fn the_largest_leaves_are_used() {
    uses_the_largest_leaves::<Ept>(Levels::Four);
    uses_the_largest_leaves::<Ept>(Levels::Five);
    uses_the_largest_leaves::<Npt>(Levels::Four);
}

#[test]
fn what_is_present_stays_and_is_told() {
    let table = table::<Ept>(Levels::Four);
    map(&table, 0x3000, 0x2000, 0x33, PageSize::Size4K);
    let done = table.map(range(0, 2 * MIB), Pfn::new(0), all(), PageSize::Size2M, Present::Keep);
    assert_eq!((done.mapped.size_4k, done.spurious), (510, 2));
    assert_eq!(table.walk(Gpa::new(0x4000)).unwrap().pfn, Pfn::new(0x34));
    let again = table.map(range(0, MIB), Pfn::new(0), all(), PageSize::Size2M, Present::Keep);
    assert_eq!((again.mapped, again.spurious), (Leaves::NONE, 256));
}

#[test]
fn another_frame_is_refused_and_the_place_told() {
    let table = table::<Ept>(Levels::Four);
    map(&table, 0x3000, 0x1000, 0x33, PageSize::Size4K);
    let done = table.map(range(0, 0x8000), Pfn::new(0), all(), PageSize::Size4K, Present::Rebuild);
    let stopped = done.stopped.unwrap();
    assert_eq!((done.mapped.size_4k, stopped.gpa), (3, Gpa::new(0x3000)));
    assert_eq!(stopped.obstacle, Obstacle::Conflict);
}

#[test]
fn rebuilding_gives_new_attributes_and_owes_a_flush_when_it_narrows() {
    let table = table::<Npt>(Levels::Four);
    map(&table, 0, 0x4000, 0x10, PageSize::Size4K);
    table.view().access(Gpa::new(0), Access::Write).unwrap();
    let read = Attributes::new(Permissions::READ);
    let done = table.map(range(0, 0x4000), Pfn::new(0x10), read, PageSize::Size4K, Present::Rebuild);
    assert_eq!((done.rebuilt.size_4k, done.flush.range()), (4, Some(range(0, 0x4000))));
    assert_eq!(table.walk(Gpa::new(0)).unwrap().attributes, read);
}

#[test]
fn a_table_gives_way_to_a_larger_leaf_of_the_same_run() {
    for (size, cap) in [(PageSize::Size2M, PageSize::Size4K), (PageSize::Size1G, PageSize::Size2M)] {
        let table = table::<Ept>(Levels::Four);
        map(&table, 0, size.bytes() / 2, 0, cap);
        map(&table, size.bytes() / 2, PAGE_SIZE, size.pages() / 2, PageSize::Size4K);
        let before = table.leaves();
        let done = table.place(Gpa::new(0), size, Pfn::new(0), all(), Present::Collapse, || true);
        assert_eq!((done.mapped, done.replaced), (Leaves::of(size, 1), before));
        assert_eq!(done.flush.range(), Some(range(0, size.bytes())));
        done.flush.complete(|_| ());
        assert_eq!(table.leaves(), Leaves::of(size, 1));
        assert_eq!(table.walk(Gpa::new(size.bytes() - 1)).unwrap().page_size, size);
        // Of another run it does not.
        unmap(&table, 0, size.bytes(), Edges::Whole);
        map(&table, 0, PAGE_SIZE, 7, PageSize::Size4K);
        let done = table.place(Gpa::new(0), size, Pfn::new(0), all(), Present::Rebuild, || true);
        assert_eq!(done.stopped.unwrap().obstacle, Obstacle::Conflict);
    }
}

#[test]
fn nothing_is_mapped_until_the_flush_is_done() {
    let table = table::<Ept>(Levels::Four);
    map(&table, 0, 4 * MIB, 0, PageSize::Size4K);
    let gone = table.unmap(range(0x1000, 2 * MIB), Edges::Whole);
    assert_eq!((gone.leaves.size_4k, gone.flush.range()), (512, Some(range(0x1000, 2 * MIB))));
    assert!(table.walk(Gpa::new(0x1000)).is_none());
    let early = table.map(range(0, 4 * MIB), Pfn::new(0x9000), all(), PageSize::Size4K, Present::Keep);
    assert_eq!(early.stopped.unwrap().gpa, Gpa::new(0x1000));
    assert_eq!(early.stopped.unwrap().obstacle, Obstacle::Frozen);
    gone.flush.complete(|range| assert_eq!(range.bytes(), 2 * MIB));
    map(&table, 0, 4 * MIB, 0x9000, PageSize::Size4K);
    assert_eq!(table.walk(Gpa::new(0x1000)).unwrap().pfn, Pfn::new(0x9001));
}

#[test]
fn edges_of_large_leaves_are_split_or_taken_whole() {
    let table = table::<Npt>(Levels::Four);
    map(&table, 0, 1024 * MIB, 0, PageSize::Size1G);
    let done = table.unmap(range(0x5000, 0x1000), Edges::Split);
    assert_eq!(done.leaves, Leaves::of(PageSize::Size4K, 1));
    assert_eq!(done.flush.range(), Some(range(0x5000, 0x1000)));
    done.flush.complete(|_| ());
    assert_eq!(table.leaves(), Leaves { size_4k: 511, size_2m: 511, size_1g: 0 });
    assert_eq!(table.walk(Gpa::new(0x6000)).unwrap().pfn, Pfn::new(6));
    assert!(table.walk(Gpa::new(0x5000)).is_none());
    assert_eq!(unmap(&table, 2 * MIB, PAGE_SIZE, Edges::Whole), Leaves::of(PageSize::Size2M, 1));
}

#[test]
fn the_processor_notes_use_and_is_refused_what_is_not_permitted() {
    let table = table::<Ept>(Levels::Four);
    let attributes = Attributes::new(Permissions::READ_WRITE);
    let done = table.map(range(0, 2 * MIB), Pfn::new(0), attributes, PageSize::Size2M, Present::Keep);
    assert_eq!(done.mapped.size_2m, 1);
    let view = table.view();
    let used = |gpa, access| view.access(Gpa::new(gpa), access).map(|leaf| leaf.attributes.used);
    assert_eq!(used(0x1000, Access::Read), Ok(Use { accessed: true, dirty: false }));
    assert_eq!(used(0x1000, Access::Write), Ok(Use::ALL));
    assert_eq!(used(2 * MIB, Access::Read), Err(AccessFault::NotMapped));
    assert!(matches!(used(0, Access::Execute), Err(AccessFault::NotPermitted(leaf)) if leaf.writable()));
    let protected = table.write_protect(range(0, 0x1000), Edges::Whole);
    assert_eq!(protected.leaves, Leaves::of(PageSize::Size2M, 1));
    protected.flush.complete(|_| ());
    assert!(matches!(used(0, Access::Write), Err(AccessFault::NotPermitted(_))));
}

#[test]
fn dirty_pages_are_told_once() {
    let table = table::<Ept>(Levels::Four);
    map(&table, 0, 8 * PAGE_SIZE, 0, PageSize::Size4K);
    for page in [1, 5] {
        table.view().access(Gpa::new(page * PAGE_SIZE), Access::Write).unwrap();
    }
    let mut told = Vec::new();
    let done = table.test_and_clear_dirty(range(0, 2 * MIB), |leaf| told.push(leaf.gpa.raw() / PAGE_SIZE));
    assert_eq!(done.flush.range(), Some(range(PAGE_SIZE, 5 * PAGE_SIZE)));
    assert_eq!(told, [1, 5]);
    let again = table.test_and_clear_dirty(range(0, 2 * MIB), |_| panic!("told twice"));
    assert!(!again.flush.is_owed());
}

#[test]
fn a_withdrawn_mapping_is_not_published() {
    let table = table::<Ept>(Levels::Four);
    for size in PageSize::ALL {
        let done = table.place(Gpa::new(0), size, Pfn::new(0), all(), Present::Rebuild, || false);
        assert_eq!(done.stopped.unwrap().obstacle, Obstacle::Withdrawn);
        assert!(table.walk(Gpa::new(0)).is_none());
        // Of another block, since 4 KiB makes a table here.
        let done = table.place(Gpa::new(size.bytes()), size, Pfn::new(0), all(), Present::Rebuild, || true);
        assert_eq!(done.mapped, Leaves::of(size, 1));
    }
}

#[test]
fn a_block_is_filled_with_frames_and_permissions_of_any_order() {
    let table = table::<Ept>(Levels::Four);
    let leaf = |gpa: Gpa| {
        let page = gpa.frame().number();
        let permissions = if page.is_multiple_of(3) { Permissions::READ } else { Permissions::ALL };
        page.is_multiple_of(2).then(|| (Pfn::new(1000 - page), Attributes::new(permissions)))
    };
    let done = table.fill(range(0, 2 * MIB), Present::Keep, || true, leaf);
    assert_eq!(done.mapped.size_4k, 256);
    assert!(table.walk(Gpa::new(0x1000)).is_none());
    assert_eq!(table.walk(Gpa::new(0x2000)).unwrap().pfn, Pfn::new(998));
    assert!(!table.walk(Gpa::new(0x6000)).unwrap().writable());
}

#[test]
fn a_cursor_maps_over_blocks_and_counts_when_finished() {
    let table = table::<Npt>(Levels::Five);
    let mut cursor = table.cursor(Present::Keep);
    for page in 500..1100 {
        cursor.map(Gpa::new(page * PAGE_SIZE), Pfn::new(page), all()).unwrap();
        assert_eq!(cursor.query(Gpa::new(page * PAGE_SIZE)).unwrap().pfn, Pfn::new(page));
    }
    let done = cursor.finish();
    assert_eq!((done.mapped.size_4k, table.leaves().size_4k), (600, 600));
    assert_eq!(
        table.cursor(Present::Keep).map(Levels::Five.limit(), Pfn::new(0), all()),
        Err(Obstacle::BeyondTable)
    );
}

#[test]
fn scattered_pages_are_mapped_in_order_up_to_the_first_obstacle() {
    let table = table::<Ept>(Levels::Four);
    let page = |number: u64| (Gpa::new(number * 0x12_3000), Pfn::new(number));
    let done = table.map_scattered((0..1000).map(page), all(), Present::Keep);
    assert_eq!((done.mapped.size_4k, done.stopped, table.leaves().size_4k), (1000, None, 1000));
    for number in 0..1000 {
        assert_eq!(table.walk(page(number).0).map(|leaf| leaf.pfn), Some(Pfn::new(number)));
    }
    let again = table.map_scattered((998..1002).map(page), all(), Present::Keep);
    assert_eq!((again.mapped.size_4k, again.spurious), (2, 2));
    let beyond = Levels::Four.limit();
    let list = [(Gpa::new(0x1000), Pfn::new(1)), (beyond, Pfn::new(2)), (Gpa::new(0x2000), Pfn::new(3))];
    let stopped = table.map_scattered(list, all(), Present::Keep);
    assert_eq!(stopped.stopped.map(|stopped| stopped.gpa), Some(beyond));
    assert!(table.walk(Gpa::new(0x1000)).is_some() && table.walk(Gpa::new(0x2000)).is_none());
}
