//! A memory cgroup made for a test, and programs run in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A cgroup with a limit, removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one in which `bytes` of memory may be used, and no swap. Where that can't be, says why.
    pub(crate) fn new(name: &str, bytes: u64) -> Option<Self> {
        match Self::make(&format!("premap-{name}-{}", std::process::id()), bytes) {
            Ok(group) => Some(group),
            Err(why) => {
                eprintln!("skipped: no memory cgroup can be made here: {why}");
                None
            }
        }
    }

    fn make(name: &str, bytes: u64) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
        let of_memory = |line: &&str| match line.split_once(" - ") {
            Some((_, behind)) => {
                let options = behind.split(' ').nth(2).unwrap_or_default();
                behind.starts_with("cgroup2 ") || options.split(',').any(|option| option == "memory")
            }
            None => false,
        };
        let mut why = "none is mounted".to_owned();
        for point in mounts.lines().filter(of_memory).filter_map(|line| line.split(' ').nth(4)) {
            match Self::make_at(&Path::new(point).join(name), bytes) {
                Ok(group) => return Ok(group),
                Err(error) => why = format!("{point}: {error}"),
            }
        }
        Err(why)
    }

    fn make_at(path: &Path, bytes: u64) -> std::io::Result<Self> {
        fs::create_dir(path)?;
        let group = Self(path.to_owned());
        let set = |file: &str, value: &str| fs::write(path.join(file), value);
        set("memory.max", &bytes.to_string())
            .or_else(|_| set("memory.limit_in_bytes", &bytes.to_string()))?;
        // Not every kernel has these.
        let _ = set("memory.swap.max", "0").or_else(|_| set("memory.swappiness", "0"));
        Ok(group)
    }

    /// Its name in errors and reports.
    pub(crate) fn told(&self) -> String {
        format!("cgroup {}", self.0.display())
    }

    /// A command that runs a program in it.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg("echo 0 >\"$0\" && exec \"$@\"").arg(self.0.join("cgroup.procs")).arg(program);
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last process may take a moment to be gone.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
