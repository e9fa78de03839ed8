//! What tests of seccomp filters share: the rules of a mode as a filter, and what of them a piece of work needs.

mod compare;
mod filter;
mod observe;

pub use compare::{Difference, compare};
pub use filter::{allow, refuse};
pub use observe::{Call, Observed, observe, observe_each};
pub use seccompiler::apply_filter;
