//! A cgroup made for a test, and programs run in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A cgroup with a limit, removed at the end.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one in which `bytes` of memory may be used, and no swap. Where that can't be, says why.
    pub(crate) fn new(name: &str, bytes: u64) -> Option<Self> {
        let group = Self::or_skip("memory", name, ["memory.max", "memory.limit_in_bytes"], bytes)?;
        // Not every kernel has these.
        let set = |file: &str| fs::write(group.0.join(file), "0");
        let _ = set("memory.swap.max").or_else(|_| set("memory.swappiness"));
        Some(group)
    }

    /// Makes one with a limit of some controller, in the first of the files that there is.
    pub(crate) fn or_skip(controller: &str, name: &str, files: [&str; 2], bytes: u64) -> Option<Self> {
        let name = format!("premap-{name}-{}", std::process::id());
        let made = Self::make(controller, &name, files, bytes);
        made.inspect_err(|why| eprintln!("skipped: no {controller} cgroup can be made here: {why}")).ok()
    }

    fn make(controller: &str, name: &str, files: [&str; 2], bytes: u64) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
        let serves = |line: &&str| match line.split_once(" - ") {
            Some((_, behind)) => {
                let options = behind.split(' ').nth(2).unwrap_or_default();
                behind.starts_with("cgroup2 ") || options.split(',').any(|option| option == controller)
            }
            None => false,
        };
        let mut why = "none is mounted".to_owned();
        for point in mounts.lines().filter(serves).filter_map(|line| line.split(' ').nth(4)) {
            // Where it is so already, or of version 1, this fails and changes nothing.
            let _ = fs::write(Path::new(point).join("cgroup.subtree_control"), format!("+{controller}"));
            match Self::make_at(&Path::new(point).join(name), files, bytes) {
                Ok(group) => return Ok(group),
                Err(error) => why = format!("{point}: {error}"),
            }
        }
        Err(why)
    }

    fn make_at(path: &Path, files: [&str; 2], bytes: u64) -> std::io::Result<Self> {
        fs::create_dir(path)?;
        let group = Self(path.to_owned());
        let [new, old] = files.map(|file| path.join(file));
        fs::write(new, bytes.to_string()).or_else(|_| fs::write(old, bytes.to_string()))?;
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
