//! A kernel and the modules that make it a KVM host: Debian's cloud kernel, or one that [`source`] builds.
//!
//! A cloud kernel is chosen by name from the package index: the highest version of the wanted line that can be had. What
//! was chosen is pinned under `target/lab/kernels/<line>`, and later runs use it without asking again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Suites, fresh_directory};
use super::{modules, note, source, version};

const FLAVOUR: &str = "-cloud-amd64";
/// What a kernel was built with, beside its image.
const CONFIGURATION: &str = "config";
/// What gives Debian's kernels a file system on a disk, where it is not built in, for VMMs whose memory is a file.
const DISK: [&str; 2] = ["loop", "ext4"];
/// Which of them one of Debian's kernels was unpacked with, beside its image.
const MODULES: &str = "modules-asked";

/// A line of kernels to choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// The newest that Debian has.
    Latest,
    /// The newest of one release series, such as `6.12`.
    Series(String),
    /// The one with software-protected VMs, built from source.
    Private,
}

impl std::str::FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_series =
            text.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
        match text {
            "latest" => Ok(Self::Latest),
            "private" => Ok(Self::Private),
            _ if is_series => Ok(Self::Series(text.to_owned())),
            _ => Err(format!("{text} is no kernel series; give one such as 6.12, or latest, or private")),
        }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Latest => "latest",
            Self::Series(series) => series,
            Self::Private => "private",
        })
    }
}

impl Line {
    /// Whether a cloud kernel of this release is of the line.
    fn takes(&self, release: &str) -> bool {
        match self {
            Self::Latest => true,
            Self::Private => false,
            Self::Series(series) => {
                release.strip_prefix(series).is_some_and(|rest| rest.starts_with(['.', '-', '+', '~']))
            }
        }
    }
}

/// A kernel ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The release as `uname -r` will tell it.
    pub(crate) release: String,
    /// The bootable image.
    pub(super) image: PathBuf,
    /// Uncompressed modules, each after those it depends on.
    pub(super) modules: Vec<PathBuf>,
}

impl Kernel {
    /// Returns the pinned kernel of this line, if there is one.
    pub(super) fn pinned(lab: &Path, line: &Line) -> Option<Self> {
        let directory = directory(lab, line);
        let (made_of, wanted) = match line {
            Line::Private => (CONFIGURATION, source::CONFIGURATION.to_owned()),
            Line::Latest | Line::Series(_) => (MODULES, DISK.join(" ")),
        };
        if fs::read_to_string(directory.join(made_of)).ok()? != wanted {
            return None;
        }
        let release = fs::read_to_string(directory.join("release")).ok()?.trim().to_owned();
        let mut modules: Vec<_> =
            fs::read_dir(directory.join("modules")).ok()?.flatten().map(|entry| entry.path()).collect();
        modules.sort();
        Some(Self { release, image: directory.join("vmlinuz"), modules })
    }

    /// Chooses a kernel of this line and downloads it, or builds it, and pins it.
    pub(super) fn obtain(lab: &Path, apt: &Apt, line: &Line) -> Result<Self> {
        match line {
            Line::Private => Self::build(lab, apt),
            Line::Latest | Line::Series(_) => Self::download(lab, apt, line),
        }
    }

    fn build(lab: &Path, apt: &Apt) -> Result<Self> {
        let built = source::build(lab, apt).context("cannot build the private kernel")?;
        let fresh = gather(lab, &built.release, &built.image, &built.modules)?;
        fs::write(fresh.join(CONFIGURATION), source::CONFIGURATION)?;
        pin(lab, &Line::Private, &fresh)?;
        built.remove()?;
        Self::pinned(lab, &Line::Private).context("a kernel that was just built is not there")
    }

    fn download(lab: &Path, apt: &Apt, line: &Line) -> Result<Self> {
        let packages = apt.package_names(Suites::Kernels, "linux-")?;
        let releases = releases(&packages, line);
        if releases.is_empty() {
            bail!(
                "no {line} cloud kernel for amd64 in Debian's package lists; try --kernel latest, or a suite that has it"
            );
        }
        let mut last = None;
        // An index can name packages that the archive no longer has, so the next best ones get their turn.
        for release in releases.iter().take(4) {
            match unpack(lab, apt, line, release, &packages) {
                Ok(()) => {
                    note!("kernel {line} is {release}");
                    return Self::pinned(lab, line).context("a kernel that was just unpacked is not there");
                }
                Err(error) => {
                    note!("kernel {release} cannot be had: {error:#}");
                    last = Some(error);
                }
            }
        }
        Err(last.context("no kernel was tried")?.context(format!("cannot obtain a {line} kernel")))
    }
}

fn directory(lab: &Path, line: &Line) -> PathBuf {
    lab.join("kernels").join(line.to_string())
}

/// Returns the releases of a line that have an image among the packages, highest first.
fn releases(packages: &[String], line: &Line) -> Vec<String> {
    let mut releases: Vec<_> = packages
        .iter()
        .filter_map(|package| {
            let release =
                package.strip_prefix("linux-image-").or_else(|| package.strip_prefix("linux-binary-"))?;
            let release = release.strip_suffix("-unsigned").unwrap_or(release);
            let bare = release.strip_suffix(FLAVOUR)?;
            // Metapackages such as linux-image-6.12-cloud-amd64 name a series and no release.
            let is_release =
                bare.starts_with(|first: char| first.is_ascii_digit()) && bare.split('.').count() >= 3;
            (is_release && line.takes(bare)).then(|| release.to_owned())
        })
        .collect();
    releases.sort_by(|left, right| version::compare(right, left));
    releases.dedup();
    releases
}

/// Unpacks a release's packages and keeps the image and the modules.
fn unpack(lab: &Path, apt: &Apt, line: &Line, release: &str, packages: &[String]) -> Result<()> {
    let root = lab.join("kernel-packages");
    fresh_directory(&root)?;
    // Up to 6.19 one package has everything; later the image and the modules have packages of their own.
    let candidates = [
        "linux-image-R",
        "linux-image-R-unsigned",
        "linux-binary-R",
        "linux-binary-R-unsigned",
        "linux-modules-R",
    ];
    let mut found = (None, None);
    for candidate in candidates.map(|pattern| pattern.replace('R', release)) {
        if !packages.contains(&candidate) {
            continue;
        }
        apt.unpack(Suites::Kernels, &candidate, &root)?;
        found = (image(&root, release), module_tree(&root, release));
        if found.0.is_some() && found.1.is_some() {
            break;
        }
    }
    let (Some(image), Some(tree)) = found else {
        bail!("the packages of {release} have no kernel image or no kvm module");
    };

    let fresh = gather(lab, release, &image, &tree)?;
    fs::write(fresh.join(MODULES), DISK.join(" "))?;
    pin(lab, line, &fresh)?;
    fs::remove_dir_all(root)?;
    Ok(())
}

/// Copies the image, and the modules of a tree that the lab needs, to where a kernel waits for being pinned.
fn gather(lab: &Path, release: &str, image: &Path, tree: &Path) -> Result<PathBuf> {
    let fresh = lab.join("kernel-new");
    fresh_directory(&fresh)?;
    fs::copy(image, fresh.join("vmlinuz"))?;
    fs::create_dir(fresh.join("modules"))?;
    for (at, (name, bytes)) in modules::with_dependencies(tree, &["kvm-amd"], &DISK)?.iter().enumerate() {
        fs::write(fresh.join("modules").join(format!("{at:02}-{name}.ko")), bytes)?;
    }
    fs::write(fresh.join("release"), release)?;
    Ok(fresh)
}

/// Makes what was gathered the line's kernel. One rename, so that a pinned kernel is always whole.
fn pin(lab: &Path, line: &Line, fresh: &Path) -> Result<()> {
    let pinned = directory(lab, line);
    if pinned.exists() {
        fs::remove_dir_all(&pinned)?;
    }
    fs::create_dir_all(lab.join("kernels"))?;
    fs::rename(fresh, pinned)?;
    Ok(())
}

fn image(root: &Path, release: &str) -> Option<PathBuf> {
    [
        format!("boot/vmlinuz-{release}"),
        format!("usr/lib/modules/{release}/vmlinuz"),
        format!("lib/modules/{release}/vmlinuz"),
    ]
    .into_iter()
    .map(|path| root.join(path))
    .find(|path| path.is_file())
}

fn module_tree(root: &Path, release: &str) -> Option<PathBuf> {
    ["usr/lib/modules", "lib/modules"]
        .into_iter()
        .map(|path| root.join(path).join(release))
        .find(|path| path.join("kernel/arch/x86/kvm").is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, packages: &[&str], expected: &[&str]) {
        let packages: Vec<_> = packages.iter().map(|&package| package.to_owned()).collect();
        assert_eq!(releases(&packages, &line.parse().unwrap()), expected, "{line}");
    }

    #[test]
    fn the_highest_release_of_the_line_comes_first() {
        let packages = [
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.118+deb12-amd64",
            "linux-image-6.1.0-47-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-image-cloud-amd64",
            "linux-image-cloud-amd64-dbg",
        ];
        check("6.12", &packages, &["6.12.117+deb12-cloud-amd64", "6.12.95+deb12-cloud-amd64"]);
        check("6.1", &packages, &["6.1.0-47-cloud-amd64"]);
        check("5.10", &packages, &[]);
        let latest = releases(&packages.map(str::to_owned), &Line::Latest);
        assert_eq!(latest[0], "7.3.4+deb13-cloud-amd64");
    }

    #[test]
    fn a_line_is_a_series_or_has_a_name() {
        assert_eq!("latest".parse(), Ok(Line::Latest));
        assert_eq!("6.12".parse(), Ok(Line::Series("6.12".to_owned())));
        assert_eq!("private".parse(), Ok(Line::Private));
        for wrong in ["", "newest", "6.", "6.x"] {
            assert!(wrong.parse::<Line>().is_err(), "{wrong}");
        }
    }
}
