//! The kernel's release, and what is known to go wrong on it.

use super::check::{Check, Status};

/// A release's first two numbers.
type Version = (u32, u32);

/// The first release with KVM_PRE_FAULT_MEMORY.
const FIRST: Version = (6, 11);

/// Something that goes wrong from [`FIRST`] on until a release has it fixed.
struct Hazard {
    fixed: Version,
    what: &'static str,
}

/// By the release that fixed it: 6385d01eec16, 20a6cff3b283, 3ccbf6f47098.
const HAZARDS: [Hazard; 3] = [
    Hazard { fixed: (6, 13), what: "pre-faulting what is mapped already maps it anew" },
    Hazard {
        fixed: (6, 15),
        what: "after a memslot was deleted or moved, a vCPU's next pre-fault spins until a signal comes or the vCPU runs",
    },
    Hazard {
        fixed: (6, 18),
        what: "pre-faulting a memslot while it is being deleted spins until a signal comes",
    },
];

/// Judges a release string, as uname gives it.
pub(super) fn check(release: &str) -> Check {
    let name = "kernel release";
    let Some(version) = parse(release) else {
        return Check::new(
            name,
            Status::Limited,
            format!("{release}, which is no release of Linux that premap knows"),
        );
    };
    if version < FIRST {
        return Check::new(name, Status::Missing, format!("{release}, which has no KVM_PRE_FAULT_MEMORY"))
            .advise("run Linux 6.11 or later, best 6.18 or later");
    }
    let hazards: Vec<_> = HAZARDS
        .iter()
        .filter(|hazard| version < hazard.fixed)
        .map(|Hazard { fixed: (major, minor), what }| format!("{what} (fixed in {major}.{minor})"))
        .collect();
    if hazards.is_empty() {
        return Check::good(name, format!("{release}, no known hazards"));
    }
    let result = format!("{release}: {}", hazards.join("; "));
    Check::new(name, Status::Limited, result).advise(
        "finish memslot changes before pre-mapping, as premap's watchdog can only end such a spin; or run Linux 6.18 or \
         later",
    )
}

fn parse(release: &str) -> Option<Version> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn judge(release: &str, status: Status, said: &[&str], unsaid: &[&str]) {
        let check = check(release);
        assert_eq!(check.status, status, "{check:?}");
        for part in said {
            assert!(check.result.contains(part), "{part} is not in {check:?}");
        }
        for part in unsaid {
            assert!(!check.result.contains(part), "{part} is in {check:?}");
        }
        assert_eq!(check.advice.is_none(), matches!(status, Status::Good), "{check:?}");
    }

    #[test]
    fn each_release_has_the_hazards_that_later_ones_fixed() {
        judge("6.1.0-13-amd64", Status::Missing, &["has no KVM_PRE_FAULT_MEMORY"], &["spins"]);
        judge("6.10.9", Status::Missing, &["has no"], &[]);
        judge("6.11.0", Status::Limited, &["6.13", "6.15", "6.18"], &[]);
        judge("6.12.117+deb13-cloud-amd64", Status::Limited, &["maps it anew", "6.15", "6.18"], &[]);
        judge("6.14.2", Status::Limited, &["6.15", "6.18"], &["6.13"]);
        judge("6.17.0-rc3", Status::Limited, &["being deleted"], &["moved"]);
        judge("6.18.44", Status::Good, &["no known hazards"], &["fixed in"]);
        judge("7.3.4+deb13-cloud-amd64", Status::Good, &["no known hazards"], &[]);
    }

    #[test]
    fn an_unknown_release_is_no_panic() {
        for release in ["", "mainline", "6", "99999999999.1"] {
            assert_eq!(check(release).status, Status::Limited, "{release}");
        }
    }
}
