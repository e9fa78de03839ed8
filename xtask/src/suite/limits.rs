//! Commands in cgroups that are too small for them: they end by themselves, and say which limit it was.

use std::time::Duration;

use anyhow::{Result, bail};

use super::job;
use crate::lab::boot::Boot;
use crate::lab::kernel::Kernel;

/// How long a command may take that has nothing to do, or little.
const LIMIT: Duration = Duration::from_secs(120);
/// The exit codes of a process that was killed by SIGKILL or SIGABRT, and of one that panicked.
const WRONG: [i32; 3] = [137, 134, 101];
/// Enters a cgroup that has the limits of the first argument, a file and a value in turn, and becomes the command.
const CONFINE: &str = "set -e; group=/sys/fs/cgroup/limited; mkdir -p $group; limits=$1; shift; set -f; \
    for limit in $limits; do echo ${limit#*=} >$group/${limit%%=*}; done; echo 0 >$group/cgroup.procs; exec \"$@\"";
/// Takes the cgroup away, once nobody is in it.
const FREE: &str = "rmdir /sys/fs/cgroup/limited";

/// A command in a cgroup.
struct Confined {
    /// The cgroup's files and what is written to them.
    limits: &'static str,
    command: &'static str,
    /// What it has to say; nothing where the limit need not be noticed.
    says: &'static str,
}

const ALL: [Confined; 4] = [
    Confined { limits: "memory.max=64M", command: "premap run --memory 512M", says: "cgroup" },
    Confined { limits: "memory.max=64M", command: "premap doctor", says: "cgroup" },
    Confined {
        limits: "hugetlb.2MB.max=16M",
        command: "premap run --memory 64M --backing hugetlb",
        says: "hugetlb",
    },
    Confined { limits: "pids.max=4", command: "premap run --memory 16M --vcpus 8", says: "" },
];

/// Runs them in a boot. The private kernel is built without cgroups.
///
/// # Errors
///
/// Which of them was killed, panicked, hung, or did not say why.
pub(super) fn run(boot: &mut Boot, kernel: &Kernel) -> Result<()> {
    if kernel.release.ends_with("-private") {
        println!("limits: skipped, {} has no cgroups", kernel.release);
        return Ok(());
    }
    for confined in &ALL {
        let Confined { limits, command, says } = confined;
        println!("limits: {command} within {limits}");
        let mut argv = ["sh", "-c", CONFINE, "sh", limits].map(str::to_owned).to_vec();
        argv.extend(command.split(' ').map(str::to_owned));
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let code = boot.run(&job(argv, LIMIT), &mut output, &mut errors)?;
        output.append(&mut errors);
        let said = String::from_utf8_lossy(&output);
        if let Some(why) = shortfall(code, says, &said) {
            bail!("{command} within {limits} {why}:\n{said}");
        }
        let free = ["sh", "-c", FREE].map(str::to_owned).to_vec();
        boot.run(&job(free, LIMIT), &mut std::io::sink(), &mut std::io::stderr().lock())?;
    }
    Ok(())
}

/// What is wrong with how a command ended, if anything.
fn shortfall(code: i32, says: &str, said: &str) -> Option<String> {
    if WRONG.contains(&code) {
        return Some(format!("ended with {code}"));
    }
    (!said.contains(says)).then(|| format!("said nothing of its {says} limit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_may_fail_and_must_say_why() {
        let check = |code, said: &str, expected: bool| {
            assert_eq!(shortfall(code, "cgroup", said).is_none(), expected, "{code} {said}");
        };
        check(0, "bounded by the memory limit of cgroup /x", true);
        check(2, "--memory 512M: cgroup /x allows 64 MiB", true);
        check(1, "KVM_RUN failed: Bad address", false);
        check(137, "cgroup", false);
        check(101, "panicked in cgroup", false);
    }
}
