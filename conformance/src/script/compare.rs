//! Runs scripts on two kernels, and shrinks those that differ.

use std::fmt;
use std::time::Duration;

use premap_guest::Kernel;

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
    /// The differences, each in its shortest form.
    pub differences: Vec<Difference>,
}

/// Runs `count` scripts of a seed on both kernels. `progress` is told after each script.
pub fn compare_all<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    among: Among,
    seed: u64,
    count: u64,
    mut progress: impl FnMut(&Summary),
) -> Summary {
    let mut summary = Summary::default();
    for number in 0..count {
        let script = generate(among, seed, number);
        summary.scripts += 1;
        summary.operations += script.ops.len() as u64;
        if difference(left, right, &script, PATIENCE).is_some()
            && let Some(found) = shrink(left, right, script, (seed, number))
        {
            summary.differences.push(found);
        }
        progress(&summary);
    }
    summary
}

/// The first operation after which the kernels differ, and what each showed.
pub fn difference<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    script: &Script,
    patience: Duration,
) -> Option<(usize, Observation, Observation)> {
    let (left, right) = (run(left, script, patience), run(right, script, patience));
    let pairs = left.into_iter().zip(right).enumerate();
    pairs.map(|(at, (left, right))| (at, left, right)).find(|(_, left, right)| left != right)
}

/// Leaves out operations as long as the kernels still differ. `None` if they don't when given time.
pub fn shrink<L: Kernel, R: Kernel>(
    left: &L,
    right: &R,
    mut script: Script,
    made_by: (u64, u64),
) -> Option<Difference> {
    let mut found = difference(left, right, &script, LONG_PATIENCE)?;
    loop {
        // What comes after the difference is not part of it.
        script.ops.truncate(found.0 + 1);
        let shorter = (0..script.ops.len()).find_map(|left_out| {
            let mut shorter = script.clone();
            shorter.ops.remove(left_out);
            let found = difference(left, right, &shorter, LONG_PATIENCE)?;
            Some((shorter, found))
        });
        match shorter {
            Some((shorter, difference)) => (script, found) = (shorter, difference),
            None => break,
        }
    }
    let (at, left, right) = found;
    Some(Difference { made_by, script, at, left, right })
}
