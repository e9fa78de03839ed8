//! A VM's memory in the order of a working set.

use premap::working_set::{Identity, Misfit, Touched, WorkingSet};
use premap::{Backing, Gpa, GpaRange, Hva, PageSize, Region, Touch};

const IMAGE: Identity = Identity([1; 32]);
const HOST: u64 = 0x7f00_0000_0000;

fn range(page: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(page << 12), pages << 12)
}

fn region(page: u64, pages: u64, backing: Backing, touch: Touch) -> Region {
    Region { range: range(page, pages), host: Hva::new(HOST + (page << 12)), backing, touch }
}

fn set(touched: &[(u64, u64, Touch)]) -> WorkingSet {
    let touched =
        touched.iter().map(|(page, pages, touch)| Touched { range: range(*page, *pages), touch: *touch });
    WorkingSet::new(IMAGE, PageSize::Size4K, touched.collect()).unwrap()
}

/// Two regions that touch, a hole, and a read-only one.
fn memory() -> Vec<Region> {
    vec![
        region(0, 8, Backing::Anonymous, Touch::Write),
        region(8, 8, Backing::Shared, Touch::Write),
        region(32, 4, Backing::Anonymous, Touch::Read),
    ]
}

#[test]
fn the_set_comes_first_and_every_page_once() {
    use Touch::{Read, Write};
    let set = set(&[(34, 1, Write), (6, 4, Write), (1, 1, Read)]);
    let ordered = set.first(&IMAGE, &memory()).unwrap();
    let told: Vec<_> = ordered
        .iter()
        .map(|region| (region.range.start().raw() >> 12, region.range.pages(), region.touch))
        .collect();
    let expected = [
        (34, 1, Read),
        (6, 2, Write),
        (8, 2, Write),
        (1, 1, Read),
        (0, 1, Write),
        (2, 4, Write),
        (10, 6, Write),
        (32, 2, Read),
        (35, 1, Read),
    ];
    assert_eq!(told, expected);
    for region in ordered {
        assert_eq!(region.host.raw() - region.range.start().raw(), HOST);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_values() {
    let other = Identity([2; 32]);
    let one = set(&[(1, 1, Touch::Write)]);
    assert!(matches!(one.first(&other, &memory()), Err(Misfit::OtherImage { .. })));
    for (page, pages) in [(16, 1), (35, 2), (31, 2), (14, 20)] {
        let error = set(&[(page, pages, Touch::Write)]).first(&IMAGE, &memory()).unwrap_err();
        assert_eq!(error, Misfit::Outside(range(page, pages)));
    }
    let huge = [region(0, 1024, Backing::Hugetlb(PageSize::Size2M), Touch::Write)];
    let error = one.first(&IMAGE, &huge).unwrap_err();
    assert_eq!(error, Misfit::CutsPage { range: range(1, 1), unit: 2 << 20 });
    assert!(set(&[(512, 512, Touch::Write)]).first(&IMAGE, &huge).is_ok());
}

#[test]
fn an_empty_set_leaves_memory_as_it_is() {
    assert_eq!(set(&[]).first(&IMAGE, &memory()).unwrap(), memory());
}
