//! Scripts: short lists of operations on a machine, with an observation after each.
//!
//! A script runs on two kernels, and what was observed must be the same: errno, range left, exit, what `kvm_run`
//! says of a page that could not be had, faults, pages by size, words read back. Scripts are made from a seed, so that a difference can be shown again, and a script that differs is
//! shrunk to its shortest form.
//!
//! ```text
//!   generate(seed) --> Script --+--> run on the software KVM --+
//!                               |                              +--> the same? --no--> shrink --> known? --no--> report
//!                               +--> run on /dev/kvm ----------+
//! ```

mod compare;
mod generate;
mod observation;
mod op;
mod private;
mod run;

pub use compare::{Difference, Scripts, Summary, compare_all};
pub use generate::{Among, generate};
pub use observation::{Observation, Outcome};
pub use op::{Op, Script};
pub use private::{Descriptor, PrivateOp};
pub use run::run;
