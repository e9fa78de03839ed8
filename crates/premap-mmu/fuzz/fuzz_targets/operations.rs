//! Sequences of operations on a table and on a plain map of pages, side by side.
//!
//! With cargo-fuzz: `cargo +nightly fuzz run operations`. Without, on a stable toolchain, from this folder:
//! `RUSTC_BOOTSTRAP=1 RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
//! -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table" cargo run --release --target x86_64-unknown-linux-gnu --bin operations
//! -- -max_total_time=600`.
#![no_main]

#[path = "../../tests/model/mod.rs"]
mod model;

use libfuzzer_sys::fuzz_target;
use model::{Model, Op};
use premap_mmu::{Arm64Stage2, Ept, Levels, Npt, SecureEpt};

/// A format, and what to do with a table of it.
#[derive(Debug, arbitrary::Arbitrary)]
struct Input {
    format: u8,
    five_levels: bool,
    operations: Vec<Op>,
}

fn run<F: premap_mmu::TracksUse>(levels: Levels, operations: Vec<Op>) {
    let mut model = Model::<F>::new(levels);
    for operation in operations {
        if !model.apply_tracking(operation) {
            model.apply(operation);
        }
    }
    model.finish();
}

/// Operations of one input: what many do wrong together, few of them do too, and more inputs are tried.
const LONGEST: usize = 48;

fuzz_target!(|input: Input| {
    let mut input = input;
    input.operations.truncate(LONGEST);
    let levels = if input.five_levels { Levels::Five } else { Levels::Four };
    match input.format % 4 {
        0 => run::<Ept>(levels, input.operations),
        1 => run::<Npt>(levels, input.operations),
        2 => run::<Arm64Stage2>(levels, input.operations),
        _ => {
            let mut model = Model::<SecureEpt>::new(levels);
            input.operations.into_iter().for_each(|operation| model.apply(operation));
            model.finish();
        }
    }
});
