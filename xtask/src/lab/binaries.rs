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

/// Builds the `premap` command.
pub(crate) fn premap(lab: &Path) -> Result<GuestFile> {
    note!("building premap for the lab");
    let built = build(lab, &["build", "--package", "premap-cli", "--bin", "premap"])?;
    let path = built.into_iter().find(|(name, _)| name == "premap").context("cargo built no premap")?.1;
    GuestFile::from_host(&path)
}

/// Builds the test programs of packages, each named after its package and target.
pub(crate) fn tests(lab: &Path, packages: &[&str]) -> Result<Vec<GuestFile>> {
    let mut files = Vec::new();
    for package in packages {
        note!("building the tests of {package} for the lab");
        for (name, path) in build(lab, &["test", "--no-run", "--package", package])? {
            let name = if name == package.replace('-', "_") {
                (*package).to_owned()
            } else {
                format!("{package}-{name}")
            };
            files.push(GuestFile { name, path });
        }
    }
    Ok(files)
}

fn build(lab: &Path, arguments: &[&str]) -> Result<Vec<(String, PathBuf)>> {
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
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Reads the names and paths of the executables from cargo's messages.
fn executables(messages: &str) -> Vec<(String, PathBuf)> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter_map(|message| Some((message.target?.name, message.executable?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_with_an_executable_count() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"scenarios"},"executable":"/t/scenarios-1f"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages), [("scenarios".to_owned(), PathBuf::from("/t/scenarios-1f"))]);
    }
}
