//! Any sequence of SEAMCALLs and of what guests do. After each, PAMT, Secure-EPT and child counts agree.
//!
//! `cargo +nightly fuzz run seamcalls`, from the crate's folder. `fuzz/run.sh SECONDS` does the same with a stable toolchain
//! and without cargo-fuzz.
#![no_main]

#[path = "../../tests/model/mod.rs"]
mod model;

use libfuzzer_sys::fuzz_target;
use model::{Model, Op};

fuzz_target!(|ops: Vec<Op>| {
    let mut model = Model::new();
    model.apply(&Op::Build { td: 0 });
    for op in ops.iter().take(64) {
        model.apply(op);
    }
});
