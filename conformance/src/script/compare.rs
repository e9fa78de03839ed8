//! Runs scripts on two kernels, and shrinks those that differ.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use premap_guest::Kernel;

use crate::known_differences::Known;

use super::{Among, Observation, Script, generate, run};

/// How long a pre-fault may take before it is interrupted: some times what the largest one of a script takes in the lab.
const PATIENCE: Duration = Duration::from_millis(80);
/// The same when a difference is looked at again, in case the machine was only slow.
const LONG_PATIENCE: Duration = Duration::from_secs(1);

/// A script on which two kernels differ, and the first operation after which they do.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The seed and number that made the script.
    pub made_by: (u64, u64),
    /// The script in its shortest form.
    pub script: Script,
    /// Which operation it is.
    pub at: usize,
    /// What was observed on the first kernel.
    pub left: Observation,
    /// What was observed on the second.
    pub right: Observation,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { made_by: (seed, number), script, at, left, right } = self;
        writeln!(f, "seed {seed}, script {number}, {script}")?;
        writeln!(f, "  after operation {}:", at + 1)?;
        writeln!(f, "    soft:  {left}")?;
        write!(f, "    linux: {right}")
    }
}

/// What a comparison came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Scripts run.
    pub scripts: u64,
    /// Operations in them.
    pub operations: u64,
    /// The differences that are not known, each in its shortest form.
    pub differences: Vec<Difference>,
    /// Those that are, with their reasons.
    pub known: Vec<(&'static str, Difference)>,
}

/// Which scripts to compare, and how many of them at a time.
#[derive(Clone, Debug)]
pub struct Scripts {
    /// What they are made for.
    pub among: Among,
    /// What they are made from.
    pub seed: u64,
    /// Their numbers.
    pub numbers: Range<u64>,
    /// How many at a time: a script waits more than it works, for grace periods of the kernel and for calls that spin.
    pub at_a_time: NonZeroUsize,
}

/// Runs scripts on both kernels. `progress` is told after each script.
pub fn compare_all<L: Kernel + Sync, R: Kernel + Sync>(
    left: &L,
    right: &R,
    scripts: Scripts,
    known: Known<'_>,
    progress: impl FnMut(&Summary) + Send,
) -> Summary {
    let Scripts { among, seed, numbers, at_a_time } = scripts;
    let next = AtomicU64::new(numbers.start);
    let told = Mutex::new((Summary::default(), progress));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                break;
            }
            let script = generate(among, seed, number);
            let operations = script.ops.len() as u64;
            let found = first_difference(left, right, &script, PATIENCE)
                .and_then(|_| shrink(left, right, script, (seed, number), known));
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            let (summary, progress) = &mut *told;
            summary.scripts += 1;
            summary.operations += operations;
            if let Some(found) = found {
                match known.reason(&found) {
                    Some(reason) => summary.known.push((reason, found)),
                    None => summary.differences.push(found),
                }
            }
            progress(summary);
        }
    };
    thread::scope(|scope| {
        for _ in 0..at_a_time.get() {
            scope.spawn(work);
        }
    });
    told.into_inner().unwrap_or_else(PoisonError::into_inner).0
}

/// The first operation after which the kernels differ, and what each showed.
fn first_difference<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    script: &Script,
    patience: Duration,
) -> Option<(usize, Observation, Observation)> {
    let (left, right) = (run(left, script, patience), run(right, script, patience));
    let pairs = left.into_iter().zip(right).enumerate();
    pairs.map(|(at, (left, right))| (at, left, right)).find(|(_, left, right)| left != right)
}

/// Runs a script, and gives it with the operation after which the kernels differ as its last: what comes after is not part
/// of the difference.
fn difference<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    mut script: Script,
    made_by: (u64, u64),
) -> Option<Difference> {
    let (at, left, right) = first_difference(left, right, &script, LONG_PATIENCE)?;
    script.ops.truncate(at + 1);
    Some(Difference { made_by, script, at, left, right })
}

/// Leaves out operations as long as the kernels still differ. What is not known stays so: it must not shrink into a known
/// difference that happens to be in the same script. `None` if they don't differ when given time.
fn shrink<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    script: Script,
    made_by: (u64, u64),
    known: Known<'_>,
) -> Option<Difference> {
    let mut found = difference(left, right, script, made_by)?;
    let reason = known.reason(&found);
    let shorter = |found: &Difference| {
        (0..found.script.ops.len()).find_map(|left_out| {
            let mut script = found.script.clone();
            script.ops.remove(left_out);
            difference(left, right, script, made_by).filter(|shorter| known.reason(shorter) == reason)
        })
    };
    while let Some(shorter) = shorter(&found) {
        found = shorter;
    }
    Some(found)
}
