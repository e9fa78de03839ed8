//! Where the cgroups above this process are: `/proc/self/cgroup` names them, `/proc/self/mountinfo` says where they can be
//! read.
//!
//! Neither is taken for granted: a hierarchy may be mounted anywhere, or from a directory of its own on (containers), or
//! not at all; both versions may be in use at once; and in a cgroup namespace paths start at its root, with `..` for what
//! lies outside. What can't be told for certain to be above the process is left out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Which interface a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// A cgroup that the process is in, or one above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Its directory.
    pub(super) path: PathBuf,
    pub(super) version: Version,
}

/// The cgroups of a controller, from the process's own upwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Groups {
    groups: Vec<Group>,
    count_hugetlb: bool,
}

impl Groups {
    /// Finds them in the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
    pub(super) fn find(controller: &str, of_process: &[u8], mounts: &[u8]) -> Self {
        let mounts: Vec<_> = lines(mounts).filter_map(Mount::parse).collect();
        let mut found = Self::default();
        for (version, path) in lines(of_process).filter_map(|line| membership(line, controller)) {
            let mounts = mounts.iter().filter(|mount| mount.serves(version, controller));
            // The mount from furthest up shows the most of the cgroups above.
            let Some((mount, below)) = mounts
                .filter_map(|mount| Some((mount, below(&mount.root, path)?)))
                .min_by_key(|(mount, _)| components(&mount.root).count())
            else {
                continue;
            };
            let mut own = mount.point.clone();
            own.extend(below.into_iter().map(OsStr::from_bytes));
            let above = own.ancestors().take_while(|path| path.starts_with(&mount.point));
            found.groups.extend(above.map(|path| Group { path: path.to_owned(), version }));
            found.count_hugetlb |= version == Version::Two && mount.has_option("memory_hugetlb_accounting");
        }
        found
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter()
    }

    /// Whether hugetlb pages count as memory here.
    pub(super) fn count_hugetlb(&self) -> bool {
        self.count_hugetlb
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// Reads `4:cpu,memory:/a/b` if it is of that controller, or `0::/a/b`, which is of all that version 2 has.
fn membership<'a>(line: &'a [u8], controller: &str) -> Option<(Version, &'a [u8])> {
    let mut parts = line.splitn(3, |byte| *byte == b':');
    let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    match controllers {
        b"" if number == b"0" => Some((Version::Two, path)),
        _ => has(controllers, controller).then_some((Version::One, path)),
    }
}

/// Whether a list, `rw,memory`, has an entry.
fn has(list: &[u8], entry: &str) -> bool {
    list.split(|byte| *byte == b',').any(|one| one == entry.as_bytes())
}

/// A mount of a cgroup hierarchy.
struct Mount {
    version: Version,
    /// What of the hierarchy is mounted.
    root: Vec<u8>,
    /// Where.
    point: PathBuf,
    options: Vec<u8>,
}

impl Mount {
    /// Reads `36 31 0:33 /root /point rw,relatime shared:1 - cgroup source rw,memory`.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let (root, point) = (unescape(words.nth(3)?), unescape(words.next()?));
        let mut behind = words.skip_while(|word| *word != b"-").skip(1);
        let version = match behind.next()? {
            b"cgroup" => Version::One,
            b"cgroup2" => Version::Two,
            _ => return None,
        };
        let options = behind.nth(1)?.to_owned();
        Some(Self { version, root, point: Path::new(OsStr::from_bytes(&point)).to_owned(), options })
    }

    fn has_option(&self, option: &str) -> bool {
        has(&self.options, option)
    }

    /// Whether the hierarchy has the controller. One of version 2 tells by its files.
    fn serves(&self, version: Version, controller: &str) -> bool {
        self.version == version && (version == Version::Two || self.has_option(controller))
    }
}

/// Undoes what the kernel does to spaces and the like: `\040`.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, behind)) = rest.split_first() {
        let octal = behind.get(..3).filter(|_| first == b'\\');
        let byte = octal.and_then(|octal| u8::from_str_radix(std::str::from_utf8(octal).ok()?, 8).ok());
        plain.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &behind[3..] } else { behind };
    }
    plain
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|component| !component.is_empty())
}

/// The path from a mount's root down to a cgroup; none where the cgroup is not below it.
///
/// A root of nothing but `..` lies above the namespace's own, and so above every cgroup in it; by which names the way
/// down leads can't be told.
fn below<'a>(root: &[u8], path: &'a [u8]) -> Option<Vec<&'a [u8]>> {
    let (mut root, mut path) = (components(root).peekable(), components(path).peekable());
    while root.peek().is_some() && root.peek() == path.peek() {
        root.next();
        path.next();
    }
    let rest: Vec<_> = path.collect();
    if rest.contains(&b"..".as_slice()) {
        return None;
    }
    if root.peek().is_none() {
        return Some(rest);
    }
    root.all(|component| component == b"..").then(Vec::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
         34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
         35 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory\n";
    const V2: &str = "41 31 0:38 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[track_caller]
    fn check(of_process: &str, mounts: &str, expected: &[&str]) {
        let groups = Groups::find("memory", of_process.as_bytes(), mounts.as_bytes());
        let found: Vec<_> = groups.iter().map(|group| group.path.to_str().unwrap()).collect();
        assert_eq!(found, expected, "{of_process} in {mounts}");
    }

    #[test]
    fn a_group_and_all_above_it_are_found_in_either_version() {
        let v2 = ["/sys/fs/cgroup/a.slice/b", "/sys/fs/cgroup/a.slice", "/sys/fs/cgroup"];
        check("0::/a.slice/b\n", V2, &v2);
        let v1 = ["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory"];
        check("5:cpu,cpuacct:/x\n4:memory:/a\n1:name=systemd:/y\n0::/\n", V1, &v1);
        check("4:memory:/\n", V1, &v1[1..]);
    }

    #[test]
    fn both_versions_at_once_are_both_read() {
        let hybrid = format!("{V1}{}", V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "));
        let both = [
            "/sys/fs/cgroup/memory/a",
            "/sys/fs/cgroup/memory",
            "/sys/fs/cgroup/unified/b",
            "/sys/fs/cgroup/unified",
        ];
        check("4:memory:/a\n0::/b\n", &hybrid, &both);
    }

    #[test]
    fn in_a_container_the_mount_starts_at_its_own_group() {
        let v1 = "9 8 0:32 /docker/0f3 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        check("4:memory:/docker/0f3\n", v1, &["/sys/fs/cgroup/memory"]);
        check("4:memory:/docker/0f3/in\n", v1, &["/sys/fs/cgroup/memory/in", "/sys/fs/cgroup/memory"]);
        // In a namespace of its own, which starts there too.
        check("0::/\n", V2, &["/sys/fs/cgroup"]);
        // A mount of another container's group says nothing of this process.
        check("4:memory:/docker/0f34\n", v1, &[]);
        check("4:memory:/\n", v1, &[]);
    }

    #[test]
    fn what_lies_outside_of_the_namespace_is_left_out() {
        check("0::/../other\n", V2, &[]);
        let above = V2.replace(" / ", " /../.. ");
        check("0::/a\n", &above, &["/sys/fs/cgroup"]);
        check("0::/../../x\n", &above, &["/sys/fs/cgroup/x", "/sys/fs/cgroup"]);
        check("0::/../../../x\n", &above, &[]);
    }

    #[test]
    fn the_mount_from_furthest_up_is_taken_wherever_it_is() {
        let mounts =
            format!("{}{}", V2.replace(" / /sys", " /a /part/sys"), V2.replace("/sys/fs/", "/x\\040y/"));
        check("0::/a/b c\n", &mounts, &["/x y/cgroup/a/b c", "/x y/cgroup/a", "/x y/cgroup"]);
    }

    #[test]
    fn names_are_bytes() {
        let groups = Groups::find("memory", b"0::/\xff\xfe:x\n", V2.as_bytes());
        assert_eq!(groups.iter().next().unwrap().path.as_os_str().as_bytes(), b"/sys/fs/cgroup/\xff\xfe:x");
        assert_eq!(unescape(b"a\\040\\134\\0\\777\\xyz\\"), b"a \\\\0\\777\\xyz\\");
    }

    #[test]
    fn text_that_is_none_finds_nothing() {
        for text in
            ["", "\n\n", ":::", "0:", "memory", "4:memory", "9 8 0:32 / /x - cgroup2", "- - - -", "\0"]
        {
            check(text, V2, &[]);
            check("0::/\n", text, &[]);
        }
    }

    #[test]
    fn whether_hugetlb_counts_as_memory_is_an_option_of_the_mount() {
        let found = |mounts: &str| Groups::find("memory", b"0::/\n", mounts.as_bytes()).count_hugetlb();
        assert!(!found(V2));
        assert!(found(&V2.replace("nsdelegate", "nsdelegate,memory_hugetlb_accounting")));
    }
}
