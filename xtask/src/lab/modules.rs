//! Kernel modules out of a package's tree: found by name, decompressed, with what they depend on.
//!
//! A package has no `modules.dep`, which is made when it is installed. Each module names its dependencies itself, in
//! its `.modinfo` section, as `depends=a,b` between NULs; those that are built into the kernel aren't named. Its
//! parameters are there as `parmtype=name:type`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Returns the named modules and all they depend on, uncompressed, each after its dependencies. Of those that are `wanted` and
/// not needed, one that is not there may be built into the kernel, and is left out.
pub(super) fn with_dependencies(
    tree: &Path,
    needed: &[&str],
    wanted: &[&str],
) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    walk(&tree.join("kernel"), &mut files)?;
    let mut loaded = Vec::new();
    let wanted = wanted.iter().filter(|name| find(&files, name).is_some());
    for name in needed.iter().chain(wanted) {
        visit(&files, name, &mut loaded)?;
    }
    Ok(loaded)
}

fn find<'f>(files: &'f [PathBuf], name: &str) -> Option<&'f PathBuf> {
    files.iter().find(|file| module_name(file).is_some_and(|known| known == canonical(name)))
}

fn visit(files: &[PathBuf], name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if loaded.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let file = find(files, name).with_context(|| format!("the kernel package has no module {name}"))?;
    let bytes = decompress(file).with_context(|| format!("cannot decompress {}", file.display()))?;
    for dependency in depends(&bytes) {
        visit(files, &dependency, loaded)?;
    }
    loaded.push((name.to_owned(), bytes));
    Ok(())
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Names are written with `-` or `_` for the same module.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(file: &Path) -> Option<String> {
    let (name, extension) = file.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst"].contains(&extension).then(|| canonical(name))
}

fn decompress(file: &Path) -> Result<Vec<u8>> {
    let packed = fs::read(file)?;
    let mut bytes = Vec::new();
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => bytes = packed,
        Some("xz") => {
            lzma_rust2::XzReader::new(packed.as_slice(), true).read_to_end(&mut bytes)?;
        }
        Some("zst") => {
            ruzstd::decoding::StreamingDecoder::new(packed.as_slice())?.read_to_end(&mut bytes)?;
        }
        _ => bail!("unknown compression"),
    }
    Ok(bytes)
}

/// Returns the names in a module's `depends=` entry.
fn depends(module: &[u8]) -> Vec<String> {
    let value = values(module, b"\0depends=").next().unwrap_or_default();
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Returns the names of a module's parameters.
pub(super) fn parameters(module: &[u8]) -> Vec<String> {
    let types = values(module, b"\0parmtype=");
    types.filter_map(|value| value.split_once(':').map(|(name, _)| name.to_owned())).collect()
}

/// Returns the values of the entries whose key this is, with the NUL before and the equals sign.
fn values<'a>(module: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = String> + 'a {
    let found = module.windows(key.len()).enumerate().filter(move |(_, window)| *window == key);
    found.map(move |(at, _)| {
        let value = module[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(value).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module() {
        let check = |module: &[u8], expected: &[&str]| assert_eq!(depends(module), expected);
        check(b"ELF\0license=GPL\0depends=kvm,irqbypass\0retpoline=Y\0", &["kvm", "irqbypass"]);
        check(b"ELF\0depends=\0name=kvm\0", &[]);
        check(b"ELF", &[]);
    }

    #[test]
    fn parameters_are_read_from_the_module() {
        let check = |module: &[u8], expected: &[&str]| assert_eq!(parameters(module), expected);
        check(b"ELF\0parmtype=npt:bool\0parm=npt:Nested paging\0parmtype=nested:int\0", &["npt", "nested"]);
        check(b"ELF\0parm=npt:Nested paging\0", &[]);
    }

    #[test]
    fn a_module_that_is_only_wanted_may_be_missing() {
        let tree = std::env::temp_dir().join(format!("premap-modules-{}", std::process::id()));
        fs::create_dir_all(tree.join("kernel/fs")).unwrap();
        for name in ["kvm.ko", "fs/loop.ko"] {
            fs::write(tree.join("kernel").join(name), b"ELF\0depends=\0").unwrap();
        }
        let found = with_dependencies(&tree, &["kvm"], &["loop", "ext4"]);
        let lost = with_dependencies(&tree, &["ext4"], &[]);
        fs::remove_dir_all(&tree).unwrap();
        let names: Vec<_> = found.unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["kvm", "loop"]);
        assert!(lost.unwrap_err().to_string().contains("no module ext4"));
    }

    #[test]
    fn a_module_file_is_named_in_both_spellings_and_any_compression() {
        let check = |file: &str, expected: Option<&str>| {
            assert_eq!(module_name(Path::new(file)).as_deref(), expected)
        };
        check("a/kvm-amd.ko.xz", Some("kvm_amd"));
        check("kvm.ko", Some("kvm"));
        check("kvm.ko.zst", Some("kvm"));
        check("kvm.ko.sig", None);
        check("modules.order", None);
    }
}
