//! What the workspace's packages say of themselves, from cargo's metadata.

use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A package of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    dependencies: Vec<Dependency>,
    targets: Vec<Target>,
    features: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Value,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

impl Package {
    /// Tells whether this package can do without std: that is what its default feature then is.
    pub(crate) fn can_do_without_std(&self) -> bool {
        let defaults = self.features.get("default").and_then(Value::as_array);
        defaults.is_some_and(|names| names.contains(&json!("std")))
    }

    /// Returns the parts of this package that have model checks, as arguments of `cargo test`.
    ///
    /// A package that depends on loom has them in its library, as the tests with `loom` in their path, and in test
    /// targets whose name starts with `loom`.
    pub(crate) fn loom_tests(&self) -> Vec<Vec<&str>> {
        if !self.dependencies.iter().any(|dependency| dependency.name == "loom") {
            return Vec::new();
        }
        let tests = self.targets.iter().filter(|target| target.kind == json!(["test"]));
        let tests =
            tests.filter(|target| target.name.starts_with("loom")).map(|target| vec!["--test", &target.name]);
        [vec!["--lib", "loom"]].into_iter().chain(tests).collect()
    }
}

/// Returns the workspace's packages.
pub(crate) fn all() -> Result<Vec<Package>> {
    let output = Command::new(crate::cargo())
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(crate::workspace())
        .output()
        .context("cannot run cargo metadata")?;
    parse(&output.stdout)
}

fn parse(metadata: &[u8]) -> Result<Vec<Package>> {
    let metadata: Metadata = serde_json::from_slice(metadata).context("cannot read cargo's metadata")?;
    Ok(metadata.packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_checks_and_features_are_found() {
        let packages = parse(
            br#"{"packages": [
            {"name": "a", "dependencies": [{"name": "loom", "kind": null}], "features": {"default": ["std"], "std": []},
             "targets": [{"name": "a", "kind": ["lib"]}, {"name": "loom_lock", "kind": ["test"]}, {"name": "x", "kind": ["test"]}]},
            {"name": "b", "dependencies": [{"name": "serde", "kind": "dev"}], "features": {"extra": []}, "targets": []}]}"#,
        )
        .unwrap();
        assert_eq!(packages[0].loom_tests(), [vec!["--lib", "loom"], vec!["--test", "loom_lock"]]);
        assert!(packages[0].can_do_without_std());
        assert!(packages[1].loom_tests().is_empty());
        assert!(!packages[1].can_do_without_std());
    }
}
