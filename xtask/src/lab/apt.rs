//! An apt of the lab's own: package lists and downloads under `target/lab/apt`, the system left as it is.
//!
//! Two source lists share one directory of package lists. *Kernels* has every suite that may hold a kernel, up to
//! Debian's unstable one. *Host* has only the suites of the release that this machine runs, and its backports: what
//! runs on the machine itself (QEMU, and the libraries it lacks) comes from there, so that it fits the machine's C
//! library. Addresses and keyrings come from [`sources`].

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::note;
use super::sources::{self, Archive};

/// Package lists that are younger than this are not fetched again.
const FRESH: Duration = Duration::from_secs(6 * 3600);

/// Which of the two source lists a query or a download uses.
#[derive(Clone, Copy)]
pub(super) enum Suites {
    Kernels,
    Host,
}

/// Which of the host's suites a package is preferred from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    Release,
    Backports,
}

/// The isolated state, with package lists at hand.
pub(super) struct Apt {
    directory: PathBuf,
    /// The release that this machine runs, such as `bookworm`.
    release: String,
}

impl Apt {
    /// Writes the source lists and fetches the package lists, unless they are fresh.
    pub(super) fn prepare(lab: &Path) -> Result<Self> {
        let release = host_release(&fs::read_to_string("/etc/os-release").unwrap_or_default()).context(
            "this machine's /etc/os-release names no Debian release; the lab needs Debian's packages",
        )?;
        let archives = sources::configured(Path::new("/etc/apt"));
        let Some(main) = archives.iter().find(|archive| !archive.is_security()) else {
            bail!("no Debian archive in /etc/apt; add one there, the lab takes its packages from it");
        };
        let security = archives.iter().find(|archive| archive.is_security());

        let apt = Self { directory: lab.join("apt"), release };
        fs::create_dir_all(apt.directory.join("lists/partial"))?;
        fs::create_dir_all(apt.directory.join("archives/partial"))?;
        fs::write(apt.source_list(Suites::Host), source_lines(main, security, &host_suites(&apt.release)))?;
        let changed = apt.write_kernel_list(&source_lines(main, security, &kernel_suites(&apt.release)))?;
        if changed || !apt.is_fresh() {
            apt.update()?;
        }
        Ok(apt)
    }

    /// Returns the names of all packages that start with `prefix`.
    pub(super) fn package_names(&self, suites: Suites, prefix: &str) -> Result<Vec<String>> {
        let output = run(self.command("apt-cache", suites).args(["pkgnames", prefix]))?;
        let names: BTreeSet<_> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        Ok(names.into_iter().collect())
    }

    /// Downloads one package and unpacks it under `to`.
    pub(super) fn unpack(&self, suites: Suites, package: &str, to: &Path) -> Result<()> {
        let download = self.directory.join("download");
        fresh_directory(&download)?;
        note!("downloading {package}");
        run(self.command("apt-get", suites).args(["-q", "download", package]).current_dir(&download))
            .with_context(|| format!("cannot download the package {package}"))?;
        unpack_all(&download, to)?;
        fs::remove_dir_all(&download)?;
        Ok(())
    }

    /// Returns the version of a package that apt would choose for this machine, its epoch left out.
    pub(super) fn candidate(&self, package: &str) -> Result<Option<String>> {
        let output =
            run(self.command("apt-cache", Suites::Host).args(["show", "--no-all-versions", package]))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("Version: "));
        Ok(version.map(|version| version.split_once(':').map_or(version, |(_, rest)| rest).to_owned()))
    }

    /// Downloads a package and all that it needs and this machine lacks, and unpacks them under `to`.
    pub(super) fn unpack_with_dependencies(&self, package: &str, from: Origin, to: &Path) -> Result<()> {
        let archives = self.directory.join("archives");
        fresh_directory(&archives)?;
        fs::create_dir(archives.join("partial"))?;
        note!("downloading {package} and the libraries that it needs");
        let mut command = self.command("apt-get", Suites::Host);
        // The system's package database is only read, so its lock, which takes root, isn't needed.
        command.args(["-q", "-y", "--no-install-recommends", "--download-only", "-o", "Debug::NoLocking=1"]);
        if let Origin::Backports = from {
            command.arg("-t").arg(format!("{}-backports", self.release));
        }
        run(command.args(["install", package]))
            .with_context(|| format!("cannot download {package} and its dependencies"))?;
        unpack_all(&archives, to)?;
        fresh_directory(&archives)
    }

    fn update(&self) -> Result<()> {
        note!("fetching package lists");
        // apt fails when one suite can't be had. What the others have may be enough, so a lack shows up only when
        // a package isn't found.
        let output = output(self.command("apt-get", Suites::Kernels).args(["-q", "update"]))?;
        if !output.status.success() {
            note!("some package lists could not be fetched:\n{}", complaints(&output));
        }
        fs::write(self.stamp(), "")?;
        Ok(())
    }

    fn write_kernel_list(&self, text: &str) -> Result<bool> {
        let path = self.source_list(Suites::Kernels);
        let changed = fs::read_to_string(&path).ok().as_deref() != Some(text);
        fs::write(path, text)?;
        Ok(changed)
    }

    fn is_fresh(&self) -> bool {
        let age = fs::metadata(self.stamp()).and_then(|stamp| stamp.modified()).map(|time| time.elapsed());
        matches!(age, Ok(Ok(age)) if age < FRESH)
    }

    fn stamp(&self) -> PathBuf {
        self.directory.join("fetched")
    }

    fn source_list(&self, suites: Suites) -> PathBuf {
        self.directory.join(match suites {
            Suites::Kernels => "kernels.list",
            Suites::Host => "host.list",
        })
    }

    fn command(&self, program: &str, suites: Suites) -> Command {
        let mut command = Command::new(program);
        let mut option = |name: &str, value: &OsStr| {
            let mut setting = std::ffi::OsString::from(format!("{name}="));
            setting.push(value);
            command.arg("-o").arg(setting);
        };
        option("Dir::Etc::sourcelist", self.source_list(suites).as_os_str());
        option("Dir::Etc::sourceparts", "-".as_ref());
        // A machine's own pins must not steer what the lab gets.
        option("Dir::Etc::preferences", "/dev/null".as_ref());
        option("Dir::Etc::preferencesparts", "/dev/null".as_ref());
        option("Dir::State::Lists", self.directory.join("lists").as_os_str());
        option("Dir::Cache::archives", self.directory.join("archives").as_os_str());
        // The two source lists would overwrite each other's cache of what they parsed.
        option("Dir::Cache::pkgcache", "".as_ref());
        option("Dir::Cache::srcpkgcache", "".as_ref());
        // apt's unprivileged user often can't reach a developer's target directory.
        option("APT::Sandbox::User", "root".as_ref());
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command
    }
}

/// Finds the release's code name in the text of `/etc/os-release`.
fn host_release(os_release: &str) -> Option<String> {
    let value = |name: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    };
    // Debian's testing names its code name too; unstable names none.
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME").unwrap_or("sid").to_owned())
}

fn host_suites(release: &str) -> Vec<String> {
    [
        release.to_owned(),
        format!("{release}-updates"),
        format!("{release}-backports"),
        format!("{release}-security"),
    ]
    .into()
}

/// The host's suites, those that keep a 6.12 kernel, and those that have the newest.
fn kernel_suites(release: &str) -> Vec<String> {
    let mut suites = host_suites(release);
    for suite in
        ["bookworm-backports", "bookworm-security", "trixie", "trixie-backports", "trixie-security", "sid"]
    {
        if !suites.iter().any(|known| known == suite) {
            suites.push(suite.to_owned());
        }
    }
    suites
}

fn source_lines(main: &Archive, security: Option<&Archive>, suites: &[String]) -> String {
    let mut text = String::new();
    for suite in suites {
        let archive = if suite.ends_with("-security") { security } else { Some(main) };
        let Some(archive) = archive else { continue };
        let signed_by = archive.signed_by.as_ref().map(|key| format!(" signed-by={key}")).unwrap_or_default();
        text.push_str(&format!("deb [target=Packages lang=none{signed_by}] {} {suite} main\n", archive.uri));
    }
    text
}

fn unpack_all(packages: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(packages)? {
        let path = entry?.path();
        if path.extension() == Some("deb".as_ref()) {
            run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(to))?;
        }
    }
    Ok(())
}

/// Makes `path` an empty directory.
pub(super) fn fresh_directory(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

fn output(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.output().with_context(|| format!("cannot run {program}; the lab needs Debian's apt and dpkg"))
}

fn run(command: &mut Command) -> Result<Output> {
    let output = output(command)?;
    if !output.status.success() {
        let program = command.get_program().to_string_lossy().into_owned();
        bail!("{program} ended with {}:\n{}", output.status, complaints(&output));
    }
    Ok(output)
}

/// Returns the lines that tell what went wrong.
fn complaints(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> =
        text.lines().filter(|line| line.starts_with("E:") || line.starts_with("W:")).collect();
    if lines.is_empty() { text.trim().to_owned() } else { lines.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_names_a_release() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(host_release(text).as_deref(), expected, "{text}")
        };
        check("ID=debian\nVERSION_CODENAME=bookworm\n", Some("bookworm"));
        check("NAME=\"Debian\"\nVERSION_CODENAME=\"trixie\"\nID=\"debian\"\n", Some("trixie"));
        check("ID=debian\n", Some("sid"));
        check("ID=ubuntu\nVERSION_CODENAME=noble\n", None);
    }

    #[test]
    fn each_suite_gets_a_line_from_the_archive_that_has_it() {
        let archive = |uri: &str, key: Option<&str>| Archive {
            uri: uri.to_owned(),
            suites: Vec::new(),
            signed_by: key.map(str::to_owned),
        };
        let (main, security) = (archive("http://a.example", Some("/k")), archive("http://s.example", None));
        let suites = ["sid".to_owned(), "trixie-security".to_owned()];
        assert_eq!(
            source_lines(&main, Some(&security), &suites),
            "deb [target=Packages lang=none signed-by=/k] http://a.example sid main\n\
             deb [target=Packages lang=none] http://s.example trixie-security main\n"
        );
        assert_eq!(source_lines(&main, None, &suites).lines().count(), 1);
    }

    #[test]
    fn no_suite_is_named_twice() {
        for release in ["bookworm", "trixie", "sid"] {
            let suites = kernel_suites(release);
            let distinct: BTreeSet<_> = suites.iter().collect();
            assert_eq!(distinct.len(), suites.len(), "{suites:?}");
        }
    }
}
