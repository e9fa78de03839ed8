//! The *private* kernel: one with software-protected VMs, which Debian's kernels are built without.
//!
//! It is made from Debian's source package with a configuration of its own, the smallest that the lab boots, in about 15
//! minutes of a processor. It is pinned like the others, beside the configuration that it was made with, and made anew when
//! that changes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Suites, fresh_directory};
use super::{console, note};

/// What is asked for. Each line must hold in what the kernel's own tools make of it.
pub(super) const CONFIGURATION: &str = include_str!("private.config");

const PACKAGE: &str = "linux-source-6.12";
/// The programs and headers that a build takes, and the packages that have them.
const PROGRAMS: [(&str, &str); 8] = [
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];
const HEADERS: [(&str, &str); 1] = [("/usr/include/gelf.h", "libelf-dev")];

/// A kernel that was built.
pub(super) struct Built {
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// The modules' folder, which has `kernel` in it.
    pub(super) modules: PathBuf,
    directory: PathBuf,
}

impl Built {
    /// Removes what the build needed, once image and modules were copied.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {}", self.directory.display()))
    }
}

/// Downloads the source and builds it.
///
/// # Errors
/// Tools that the machine lacks, with the packages that have them, or what failed and where its output lies.
pub(super) fn build(lab: &Path, apt: &Apt) -> Result<Built> {
    check_tools()?;
    let directory = lab.join("kernel-source");
    fresh_directory(&directory)?;
    apt.unpack(Suites::Kernels, PACKAGE, &directory)?;
    let archive = directory.join(format!("usr/src/{PACKAGE}.tar.xz"));
    let log = lab.join("last-kernel-build.log");
    let steps = Steps { log: &log, started: Instant::now() };
    steps.run(Command::new("tar").arg("-xJf").arg(&archive).arg("-C").arg(&directory))?;
    fs::remove_file(archive)?;

    let tree = directory.join(PACKAGE);
    let wanted = directory.join("wanted.config");
    fs::write(&wanted, CONFIGURATION)?;
    let make = || {
        let mut make = Command::new("make");
        make.arg("-C").arg(&tree);
        make
    };
    let mut setting = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
    setting.push(&wanted);
    steps.run(make().arg(setting).arg("allnoconfig"))?;
    let configured = fs::read_to_string(tree.join(".config"))?;
    let missing = missing(CONFIGURATION, &configured);
    if !missing.is_empty() {
        bail!("{PACKAGE} can't be configured with {}; see xtask/src/lab/private.config", missing.join(", "));
    }

    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    note!("building {PACKAGE} on {jobs} processors; this takes about 15 minutes of one, once");
    steps.run(make().arg(format!("-j{jobs}")).args(["bzImage", "modules"]))?;
    let installed = directory.join("installed");
    let mut target = std::ffi::OsString::from("INSTALL_MOD_PATH=");
    target.push(&installed);
    // The lab finds out by itself which module needs which.
    steps.run(make().arg(target).args(["DEPMOD=true", "modules_install"]))?;
    let release = fs::read_to_string(tree.join("include/config/kernel.release"))?.trim().to_owned();
    note!("{release} built in {:.0} s", steps.started.elapsed().as_secs_f64());
    Ok(Built {
        image: tree.join("arch/x86/boot/bzImage"),
        modules: installed.join("lib/modules").join(&release),
        release,
        directory,
    })
}

/// The steps of a build, each with its output in a file of its own.
struct Steps<'a> {
    log: &'a Path,
    started: Instant,
}

impl Steps<'_> {
    fn run(&self, command: &mut Command) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output = File::create(self.log).with_context(|| format!("cannot make {}", self.log.display()))?;
        let status = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .env("LC_ALL", "C.UTF-8")
            // What a developer builds other kernels with is not for this one.
            .env_remove("MAKEFLAGS")
            .env_remove("ARCH")
            .env_remove("CROSS_COMPILE")
            .status()
            .with_context(|| format!("cannot run {program}"))?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read(self.log).unwrap_or_default();
        for line in console::tail(&text, 20) {
            eprintln!("  | {line}");
        }
        bail!(
            "{program} ended with {status} while building the kernel; all it said is in {}",
            self.log.display()
        );
    }
}

/// The wanted settings that did not come to be.
fn missing<'a>(wanted: &'a str, configured: &str) -> Vec<&'a str> {
    let settings = wanted.lines().filter(|line| line.starts_with("CONFIG_"));
    settings.filter(|setting| !configured.lines().any(|line| line == *setting)).collect()
}

fn check_tools() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let programs = PROGRAMS.into_iter().filter(|(program, _)| !is_there(program));
    let headers = HEADERS.into_iter().filter(|(header, _)| !Path::new(header).is_file());
    let packages: Vec<_> = programs.chain(headers).map(|(_, package)| package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    bail!(
        "building the private kernel takes packages that this machine lacks: apt-get install {}",
        packages.join(" ")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_did_not_come_to_be_is_told() {
        let wanted = "# a comment\nCONFIG_KVM=m\n\nCONFIG_KVM_SW_PROTECTED_VM=y\n";
        let check = |configured: &str, expected: &[&str]| assert_eq!(missing(wanted, configured), expected);
        check("CONFIG_KVM=m\nCONFIG_KVM_SW_PROTECTED_VM=y\n", &[]);
        check(
            "CONFIG_KVM=y\n# CONFIG_KVM_SW_PROTECTED_VM is not set\n",
            &["CONFIG_KVM=m", "CONFIG_KVM_SW_PROTECTED_VM=y"],
        );
    }

    #[test]
    fn the_configuration_names_each_setting_once() {
        let mut names: Vec<_> = CONFIGURATION
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.split_once('=').unwrap().0)
            .collect();
        assert!(names.contains(&"CONFIG_KVM_SW_PROTECTED_VM"));
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}
