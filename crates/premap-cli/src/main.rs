//! The premap command: run, doctor.
fn main() {}
