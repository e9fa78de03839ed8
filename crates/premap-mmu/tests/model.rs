//! Every operation on every format against a plain map of pages.

#[path = "model/mod.rs"]
mod model;

use model::{Area, Model, Op, Shift};
use premap_mmu::{Arm64Stage2, Ept, Format, Levels, Npt, SecureEpt, TracksUse};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Sequences for each format, of 100 steps on average: more than 100,000 steps, or together as many without optimisation.
const CASES: u32 = if cfg!(debug_assertions) { 275 } else { 1100 };
const STEPS: usize = 100;

fn area() -> impl Strategy<Value = Area> {
    prop_oneof![
        12 => (any::<u16>(), 0_u16..64).prop_map(|(first, pages)| Area::Pages(first, pages)),
        6 => any::<(u16, u16)>().prop_map(|(first, pages)| Area::Pages(first, pages)),
        6 => any::<(u8, u8)>().prop_map(|(first, blocks)| Area::Blocks(first, blocks)),
        1 => any::<bool>().prop_map(Area::Gib),
    ]
}

fn shift() -> impl Strategy<Value = Shift> {
    prop_oneof![6 => Just(Shift::Same), 1 => Just(Shift::Aligned), 1 => Just(Shift::Odd)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (area(), shift(), any::<(u8, u8, u8)>()).prop_map(|(area, pfn, (permissions, cap, present))| {
            Op::Map { area, pfn, permissions, cap, present }
        }),
        4 => (any::<(u16, u8)>(), shift(), any::<(u8, u8)>(), prop::bool::weighted(0.9)).prop_map(
            |((page, size), pfn, (permissions, present), valid)| {
                Op::Place { page, size, pfn, permissions, present, valid }
            }
        ),
        2 => any::<(u16, u16, u8, u8)>()
            .prop_map(|(page, pages, step, present)| Op::Fill { page, pages, step, present }),
        1 => any::<(u16, u16, u8)>().prop_map(|(page, pages, present)| Op::Cursor { page, pages, present }),
        4 => (area(), any::<bool>()).prop_map(|(area, split)| Op::Unmap { area, split }),
        2 => (area(), any::<(u8, bool)>())
            .prop_map(|(area, (permissions, split))| Op::Protect { area, permissions, split }),
        1 => (area(), any::<bool>()).prop_map(|(area, split)| Op::WriteProtect { area, split }),
        1 => area().prop_map(|area| Op::ClearDirty { area }),
        1 => area().prop_map(|area| Op::ClearAccessed { area }),
        3 => any::<(u16, u8)>().prop_map(|(page, access)| Op::Touch { page, access }),
        1 => (area(), any::<u8>()).prop_map(|(area, size)| Op::Split { area, size }),
        2 => (area(), any::<u8>()).prop_map(|(area, size)| Op::Collapse { area, size }),
    ]
}

fn check<F: Format>(levels: Levels, tracking: impl Fn(&mut Model<F>, Op) -> bool) {
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    let steps = prop::collection::vec(op(), 1..2 * STEPS);
    let run = |ops: Vec<Op>| {
        let mut model = Model::<F>::new(levels);
        for op in ops {
            if !tracking(&mut model, op) {
                model.apply(op);
            }
        }
        model.finish();
        Ok(())
    };
    if let Err(error) = TestRunner::new(config).run(&steps, run) {
        panic!("{error}");
    }
}

fn check_tracking<F: TracksUse>(levels: Levels) {
    check::<F>(levels, Model::apply_tracking);
}

#[test]
fn ept_agrees_with_a_map_of_pages() {
    check_tracking::<Ept>(Levels::Four);
}

#[test]
fn npt_agrees_with_a_map_of_pages() {
    check_tracking::<Npt>(Levels::Five);
}

#[test]
fn arm_stage_2_agrees_with_a_map_of_pages() {
    check_tracking::<Arm64Stage2>(Levels::Four);
}

#[test]
fn secure_ept_agrees_with_a_map_of_pages() {
    check::<SecureEpt>(Levels::Five, |_, _| false);
}
