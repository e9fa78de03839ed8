//! Static binaries of the workspace for the guest, which has no C library.
//!
//! They have a target directory of their own, so that the flags they need leave the ordinary build cache alone.
//! Naming the target keeps those flags from build scripts and procedural macros, which can't be static.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::initramfs::GuestFile;
use super::note;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The workspace's programs that a lab command may name, each with its package.
const PROGRAMS: [(&str, &str); 3] =
    [("premap", "premap-cli"), ("conformance", "conformance"), ("example-vmm", "example-vmm")];

/// Builds the workspace's program of this name; `None` if there is none.
pub(crate) fn program(lab: &Path, name: &str) -> Result<Option<GuestFile>> {
    let Some((_, package)) = PROGRAMS.iter().find(|(known, _)| *known == name) else {
        return Ok(None);
    };
    note!("building {name} for the lab");
    let built = build(lab, &["build", "--package", package, "--bin", name])?;
    let found = built.into_iter().find(|executable| executable.name == name);
    let path = found.with_context(|| format!("cargo built no {name}"))?.path;
    Ok(Some(GuestFile { name: name.to_owned(), path }))
}

/// Builds the test programs of packages, each named after its package and target.
pub(crate) fn tests(lab: &Path, packages: &[&str]) -> Result<Vec<GuestFile>> {
    let mut files = Vec::new();
    for package in packages {
        note!("building the tests of {package} for the lab");
        // Integration tests have the package's programs built too, which are no tests.
        let built =
            build(lab, &["test", "--no-run", "--package", package])?.into_iter().filter(|one| one.is_test);
        files.extend(built.map(|Executable { name, kind, path, .. }| GuestFile {
            // A library and a program of one package often share their name.
            name: if kind == "test" { format!("{package}-{name}") } else { format!("{package}-{kind}") },
            path,
        }));
    }
    Ok(files)
}

#[derive(Debug, PartialEq, Eq)]
struct Executable {
    name: String,
    /// The target's kind, such as `lib`, `bin` or `test`.
    kind: String,
    path: PathBuf,
    is_test: bool,
}

fn build(lab: &Path, arguments: &[&str]) -> Result<Vec<Executable>> {
    let output = Command::new(crate::cargo())
        .args(arguments)
        .args(["--release", "--target", TARGET, "--message-format=json-render-diagnostics"])
        .env("CARGO_TARGET_DIR", lab.join("build"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed for the lab", arguments.join(" "));
    }
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Reads the names and paths of the executables from cargo's messages.
fn executables(messages: &str) -> Vec<Executable> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter_map(|message| {
            let is_test = message.profile.is_some_and(|profile| profile.test);
            let Target { name, kind } = message.target?;
            Some(Executable { name, kind: kind.into_iter().next()?, path: message.executable?, is_test })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_with_an_executable_count() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"serde","kind":["lib"]},"profile":{"test":false},"executable":null}
{"reason":"compiler-artifact","target":{"name":"tool","kind":["bin"]},"profile":{"test":false},"executable":"/t/tool"}
{"reason":"compiler-artifact","target":{"name":"linux","kind":["test"]},"profile":{"test":true},"executable":"/t/linux-1f"}
{"reason":"build-finished","success":true}"#;
        let executable = |name: &str, kind: &str, path: &str, is_test| Executable {
            name: name.to_owned(),
            kind: kind.to_owned(),
            path: path.into(),
            is_test,
        };
        let expected =
            [executable("tool", "bin", "/t/tool", false), executable("linux", "test", "/t/linux-1f", true)];
        assert_eq!(executables(messages), expected);
    }
}
