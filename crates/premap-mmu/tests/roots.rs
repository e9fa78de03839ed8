//! Roots by role: shared while valid, replaced at once, zapped a piece at a time.

use std::sync::Arc;

use premap_mmu::{
    Arena, Attributes, Ept, Gpa, GpaRange, Leaves, Levels, PAGE_SIZE, PageSize, Permissions, Pfn, Present,
    RootRef, Roots, Zapped,
};

/// What tells roots apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Role {
    smm: bool,
    guest_mode: bool,
}

const NORMAL: Role = Role { smm: false, guest_mode: false };

type Own = Roots<Role, Ept, Arc<Arena>>;

fn map(root: &RootRef<Role, Ept, Arc<Arena>>, gpa: u64, bytes: u64) {
    let range = GpaRange::new(Gpa::new(gpa), bytes);
    let pfn = Pfn::new(gpa / PAGE_SIZE);
    let attributes = Attributes::new(Permissions::ALL);
    let done = root.table().map(range, pfn, attributes, PageSize::Size1G, Present::Keep);
    assert!(done.stopped.is_none());
}

#[test]
fn a_role_has_one_root_until_it_is_invalidated() {
    let (arena, roots) = (Arc::new(Arena::new(64).expect("memory")), Own::new());
    let get = |role| roots.get(role, Levels::Four, &arena).expect("a frame");
    let first = get(NORMAL);
    assert!(first.same(&get(NORMAL)) && !first.same(&get(Role { smm: true, ..NORMAL })));
    roots.invalidate_all();
    assert!(first.is_obsolete() && roots.valid().is_empty());
    let second = get(NORMAL);
    assert!(!second.same(&first) && !second.is_obsolete());
}

#[test]
fn obsolete_roots_go_by_size_and_with_their_last_reference() {
    let (arena, roots) = (Arc::new(Arena::new(64).expect("memory")), Own::new());
    let held = roots.get(NORMAL, Levels::Four, &arena).expect("a frame");
    let (gib, mib) = (1 << 30, 1 << 20);
    map(&held, 0, gib);
    map(&held, gib, 4 * mib);
    map(&held, gib + 8 * mib + PAGE_SIZE, 600 * PAGE_SIZE);
    assert_eq!(roots.leaves(), Leaves { size_4k: 600, size_2m: 2, size_1g: 1 });
    roots.invalidate_all();
    let mut passes = Vec::new();
    let mut flushed = 0;
    loop {
        match roots.zap(400, |range| flushed += range.pages()) {
            Zapped::Some(gone) => passes.push(gone),
            Zapped::Root => break,
            Zapped::Nothing => panic!("the root was never done"),
        }
    }
    let expected = [Leaves::of(PageSize::Size4K, 511), Leaves { size_4k: 89, size_2m: 2, size_1g: 1 }];
    assert_eq!(passes, expected);
    assert!(flushed >= held.table().levels().limit().raw().min(gib) / PAGE_SIZE);
    assert_eq!((roots.zap(1, |_| ()), roots.leaves()), (Zapped::Nothing, Leaves::NONE));
    assert!(held.table().walk(Gpa::new(0)).is_none() && arena.in_use() > 0);
    drop(held);
    assert_eq!(arena.in_use(), 0, "every frame came back");
}

#[test]
fn every_frame_comes_back_when_a_table_goes() {
    let arena = Arc::new(Arena::new(64).expect("memory"));
    let roots = Own::new();
    let root = roots.get(NORMAL, Levels::Five, &arena).expect("a frame");
    map(&root, PAGE_SIZE, 4 << 20);
    // A flush that is forgotten leaves its tables parked with the page table, not lost.
    drop(root.table().unmap(GpaRange::new(Gpa::new(0), 4 << 20), premap_mmu::Edges::Whole));
    assert!(arena.in_use() >= 4);
    drop((root, roots));
    assert_eq!(arena.in_use(), 0);
}
