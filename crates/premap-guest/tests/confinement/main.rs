//! The library in a VMM that confines itself: by seccomp, in a chroot, and without a thread to be had.
//!
//! What is confined is a child, which is this very program run again for its one ignored test.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod child;
mod host;
mod jail;
mod modes;
mod seccomp;
mod vcpu;

/// Says why something does not run here. In the lab (`PREMAP_LAB=1`), which exists so that it can, that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("PREMAP_LAB").is_none_or(|value| value != "1"), "must run in the lab: {why}");
    eprintln!("skipped: {why}");
}
