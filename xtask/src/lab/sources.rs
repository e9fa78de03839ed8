//! The Debian archives that this machine's own apt is configured for.
//!
//! The lab never names a mirror. It reads the enabled entries of `/etc/apt`, in both of apt's formats, and keeps
//! the address and the keyring of those that serve Debian. From the archive's address and a suite's name the lab
//! then makes entries of its own, for suites that the machine doesn't have enabled.

use std::fs;
use std::path::Path;

/// One configured archive: an address, the suites taken from it, and what signs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Archive {
    pub(super) uri: String,
    pub(super) suites: Vec<String>,
    /// The path of a keyring. `None` leaves the choice to apt's trusted keys.
    pub(super) signed_by: Option<String>,
}

/// The releases whose suites count as Debian's, beside the rolling ones.
const RELEASES: [&str; 4] = ["bookworm", "trixie", "forky", "duke"];
const ROLLING: [&str; 6] = ["stable", "testing", "unstable", "sid", "oldstable", "experimental"];

impl Archive {
    /// Tells whether a suite of this archive is one of Debian's own.
    pub(super) fn is_debian(&self) -> bool {
        self.suites.iter().any(|suite| {
            let release = suite.split(['-', '/']).next().unwrap_or_default();
            RELEASES.contains(&release) || ROLLING.contains(&release)
        })
    }

    /// Tells whether this archive holds the security updates, which lie apart from the releases.
    pub(super) fn is_security(&self) -> bool {
        self.suites.iter().all(|suite| suite.ends_with("-security") || suite.ends_with("/updates"))
    }
}

/// Returns the Debian archives configured under `etc_apt`, in apt's order.
pub(super) fn configured(etc_apt: &Path) -> Vec<Archive> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut parts: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    files
        .iter()
        .filter_map(|file| {
            let text = fs::read_to_string(file).ok()?;
            // apt itself ignores every other extension, such as `.disabled`.
            match file.extension()?.to_str()? {
                "list" => Some(one_line(&text)),
                "sources" => Some(deb822(&text)),
                _ => None,
            }
        })
        .flatten()
        .filter(Archive::is_debian)
        .collect()
}

/// Parses the one-line format: `deb [option=value ...] uri suite component...`.
fn one_line(text: &str) -> Vec<Archive> {
    text.lines()
        .filter_map(|line| {
            let line = line.split('#').next()?.trim();
            let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
            let mut signed_by = None;
            if let Some(after) = rest.strip_prefix('[') {
                let (options, after) = after.split_once(']')?;
                signed_by = options
                    .split_whitespace()
                    .find_map(|option| option.strip_prefix("signed-by="))
                    .map(str::to_owned);
                rest = after;
            }
            let mut words = rest.split_whitespace();
            Some(Archive { uri: words.next()?.to_owned(), suites: vec![words.next()?.to_owned()], signed_by })
        })
        .collect()
}

/// Parses the deb822 format: stanzas of `Field: value`, continued by indented lines.
fn deb822(text: &str) -> Vec<Archive> {
    let mut archives = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            archives.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    archives
}

fn stanza(fields: &[(String, String)]) -> Vec<Archive> {
    let field = |name: &str| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let disabled = field("enabled").is_some_and(|value| ["no", "false", "0"].contains(&value));
    let binary = field("types").is_some_and(|types| types.split_whitespace().any(|kind| kind == "deb"));
    if disabled || !binary {
        return Vec::new();
    }
    // A key written into the stanza itself is no path; apt's trusted keys have Debian's anyway.
    let signed_by = field("signed-by").filter(|value| value.starts_with('/')).map(str::to_owned);
    let suites: Vec<_> = field("suites").unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    field("uris")
        .unwrap_or_default()
        .split_whitespace()
        .map(|uri| Archive { uri: uri.to_owned(), suites: suites.clone(), signed_by: signed_by.clone() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(uri: &str, suites: &[&str], signed_by: Option<&str>) -> Archive {
        Archive {
            uri: uri.to_owned(),
            suites: suites.iter().map(|&suite| suite.to_owned()).collect(),
            signed_by: signed_by.map(str::to_owned),
        }
    }

    #[test]
    fn one_line_entries_give_address_suite_and_keyring() {
        let text = "# deb http://old.example/debian sid main\n\
                    deb http://a.example/debian trixie main contrib # ours\n\
                    deb-src http://a.example/debian trixie main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://b.example/debian trixie-backports main\n";
        assert_eq!(
            one_line(text),
            [
                archive("http://a.example/debian", &["trixie"], None),
                archive("http://b.example/debian", &["trixie-backports"], Some("/k.gpg")),
            ]
        );
    }

    #[test]
    fn deb822_stanzas_give_every_address_and_suite() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://b.example/security\n\
                    Suites: bookworm-security\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n";
        assert_eq!(
            deb822(text),
            [
                archive("http://a.example/debian", &["bookworm", "bookworm-updates"], Some("/k.gpg")),
                archive("http://b.example/security", &["bookworm-security"], None),
            ]
        );
    }

    #[test]
    fn disabled_and_source_stanzas_are_left_out() {
        let text = "Types: deb\nURIs: http://a.example\nSuites: sid\nEnabled: no\n\n\
                    Types: deb-src\nURIs: http://a.example\nSuites: sid\n";
        assert_eq!(deb822(text), []);
    }

    #[test]
    fn only_debian_suites_count_and_security_is_told_apart() {
        assert!(!archive("http://n.example", &["nodistro"], None).is_debian());
        assert!(!archive("http://u.example", &["noble", "noble-updates"], None).is_debian());
        assert!(archive("http://a.example", &["bookworm-updates"], None).is_debian());
        assert!(!archive("http://a.example", &["bookworm", "bookworm-updates"], None).is_security());
        assert!(archive("http://s.example", &["bookworm-security"], None).is_security());
    }
}
