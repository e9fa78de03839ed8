//! The one entry for developers: test, lab, bench, docs.
fn main() {}
