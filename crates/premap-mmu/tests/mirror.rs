//! The mirror is told before anything is published, and what it refuses does not happen.

use std::collections::BTreeMap;
use std::sync::Mutex;

use premap_mmu::{
    Attributes, Edges, Gpa, GpaRange, Heap, Levels, Mirror, Obstacle, PAGE_SIZE, PageSize, PageTable,
    Permissions, Pfn, Present, SecureEpt,
};

/// An external table: leaves and tables by address and level, and what it refuses.
#[derive(Default)]
struct External {
    entries: Mutex<BTreeMap<(u64, u8), u64>>,
    refuses: Mutex<Option<(u64, u8)>>,
}

impl External {
    fn decide(&self, gpa: Gpa, level: u8) -> Result<(), String> {
        let refused = *self.refuses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if refused == Some((gpa.raw(), level)) { Err(format!("{gpa} at level {level}")) } else { Ok(()) }
    }

    fn set(&self, gpa: Gpa, level: u8, pfn: Pfn) -> Result<(), String> {
        self.decide(gpa, level)?;
        let mut entries = self.entries.lock().expect("no panic");
        let above = (gpa.raw() >> (12 + 9 * u32::from(level)) << (12 + 9 * u32::from(level)), level + 1);
        assert!(level == 4 || entries.contains_key(&above) || level == 3, "no table above {gpa} of {level}");
        assert_eq!(entries.insert((gpa.raw(), level), pfn.number()), None, "set twice");
        Ok(())
    }

    fn remove(&self, gpa: Gpa, level: u8) -> Result<(), String> {
        self.decide(gpa, level)?;
        self.entries.lock().expect("no panic").remove(&(gpa.raw(), level)).expect("it was set");
        Ok(())
    }

    fn leaves(&self) -> usize {
        self.entries.lock().expect("no panic").keys().filter(|(_, level)| *level == 1).count()
    }

    fn refuse(&self, what: Option<(u64, u8)>) {
        *self.refuses.lock().expect("no panic") = what;
    }
}

// An entry's level is that of the entry, so a table whose entries are of level 1 is an entry of level 2.
impl Mirror for External {
    type Refusal = String;

    fn link_table(&self, gpa: Gpa, level: u8, table: Pfn) -> Result<(), String> {
        self.set(gpa, level + 1, table)
    }

    fn set_leaf(&self, gpa: Gpa, size: PageSize, pfn: Pfn) -> Result<(), String> {
        self.set(gpa, size.level(), pfn)
    }

    fn remove_leaf(&self, gpa: Gpa, size: PageSize, _: Pfn) -> Result<(), String> {
        self.remove(gpa, size.level())
    }

    fn remove_table(&self, gpa: Gpa, level: u8, _: Pfn) -> Result<(), String> {
        self.remove(gpa, level + 1)
    }
}

type Table = PageTable<SecureEpt, Heap, External>;

fn table() -> Table {
    PageTable::with_mirror(Heap, Levels::Four, External::default()).expect("a frame")
}

fn map(table: &Table, pages: u64) -> (u64, Option<(Gpa, Obstacle<String>)>) {
    let range = GpaRange::new(Gpa::new(0), pages * PAGE_SIZE);
    let attributes = Attributes::new(Permissions::ALL);
    let done = table.map(range, Pfn::new(64), attributes, PageSize::Size4K, Present::Keep);
    (done.mapped.size_4k, done.stopped.map(|stopped| (stopped.gpa, stopped.obstacle)))
}

#[test]
fn the_mirror_holds_what_the_table_maps() {
    let table = table();
    assert_eq!(map(&table, 1000), (1000, None));
    assert_eq!(table.mirror().leaves(), 1000);
    let done = table.unmap(GpaRange::new(Gpa::new(0), 600 * PAGE_SIZE), Edges::Whole);
    assert_eq!((done.leaves.size_4k, done.stopped), (600, None));
    done.flush.complete(|_| ());
    assert_eq!((table.mirror().leaves(), table.leaves().size_4k), (400, 400));
    // The first leaf table was covered whole and went; the second is there still.
    let entries = table.mirror().entries.lock().expect("no panic");
    assert!(!entries.contains_key(&(0, 2)) && entries.contains_key(&(2 << 20, 2)));
    drop(entries);
    assert_eq!(map(&table, 1000), (600, None));
}

#[test]
fn a_refused_leaf_or_table_is_not_published() {
    for refused in [(5 * PAGE_SIZE, 1), (0, 2), (0, 3), (0, 4)] {
        let table = table();
        table.mirror().refuse(Some(refused));
        let before = if refused.1 == 1 { 5 } else { 0 };
        let (mapped, stopped) = map(&table, 10);
        let (gpa, obstacle) = stopped.expect("refused");
        assert_eq!((mapped, gpa), (before, Gpa::new(before * PAGE_SIZE)));
        assert!(matches!(obstacle, Obstacle::Refused(_)));
        assert!(table.walk(Gpa::new(5 * PAGE_SIZE)).is_none());
        assert_eq!((table.mirror().leaves() as u64, table.leaves().size_4k), (before, before));
        table.mirror().refuse(None);
        assert_eq!(map(&table, 10), (10 - before, None));
    }
}

#[test]
fn a_refused_removal_leaves_the_leaf_as_it_was() {
    let table = table();
    assert_eq!(map(&table, 512), (512, None));
    table.mirror().refuse(Some((7 * PAGE_SIZE, 1)));
    let all = GpaRange::new(Gpa::new(0), 512 * PAGE_SIZE);
    let done = table.unmap(all, Edges::Whole);
    assert_eq!(
        (done.leaves.size_4k, done.stopped.map(|stopped| stopped.gpa)),
        (7, Some(Gpa::new(7 * PAGE_SIZE)))
    );
    done.flush.complete(|_| ());
    assert_eq!(table.walk(Gpa::new(7 * PAGE_SIZE)).map(|leaf| leaf.pfn), Some(Pfn::new(71)));
    assert_eq!(table.mirror().leaves(), 505);
    // A table that may not go stays linked, without its leaves.
    table.mirror().refuse(Some((0, 2)));
    let done = table.unmap(all, Edges::Whole);
    assert_eq!(done.leaves.size_4k, 505);
    assert!(matches!(done.stopped.map(|stopped| stopped.obstacle), Some(Obstacle::Refused(_))));
    done.flush.complete(|_| ());
    table.mirror().refuse(None);
    assert_eq!(map(&table, 512), (512, None));
}

#[test]
fn a_large_leaf_is_mirrored_and_restored_too() {
    let table = table();
    let range = GpaRange::new(Gpa::new(0), 4 << 20);
    let attributes = Attributes::new(Permissions::ALL);
    let done = table.map(range, Pfn::new(512), attributes, PageSize::Size1G, Present::Keep);
    assert_eq!((done.mapped.size_2m, done.stopped), (2, None));
    table.mirror().refuse(Some((2 << 20, 2)));
    let done = table.unmap(range, Edges::Split);
    assert_eq!(done.leaves.size_2m, 1);
    done.flush.complete(|_| ());
    assert!(table.walk(Gpa::new(0)).is_none() && table.walk(Gpa::new(2 << 20)).is_some());
}
