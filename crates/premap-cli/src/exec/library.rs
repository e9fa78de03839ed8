//! Where the preloaded library lies.

use std::path::{Path, PathBuf};

use premap_exec_settings::LIBRARY;

use crate::failure::BadUse;

/// The environment variable that names the library.
const VARIABLE: &str = "PREMAP_PRELOAD";

/// Finds the library.
///
/// # Errors
/// Where it isn't, and what to do about it.
pub(super) fn find() -> anyhow::Result<PathBuf> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    let own = std::env::current_exe();
    if let (None, Err(error)) = (&named, &own) {
        return Err(BadUse(format!(
            "/proc/self/exe, by which {LIBRARY} is found beside the command: {error}; mount proc on /proc, or name the \
             library in {VARIABLE}"
        ))
        .into());
    }
    let own = own.ok();
    let library = choose(named.as_deref(), own.as_deref().and_then(Path::parent), &Path::is_file)?;
    let library = library.canonicalize().unwrap_or(library);
    // The dynamic linker takes both for separators, and has no way to write them.
    if library.to_string_lossy().contains([':', ' ']) {
        let place = library.display();
        return Err(BadUse(format!(
            "{place}: the dynamic linker can't preload from a path with a colon or a space"
        ))
        .into());
    }
    Ok(library)
}

/// Chooses what the variable names, else what lies beside the command or where libraries do.
fn choose(
    named: Option<&Path>,
    directory: Option<&Path>,
    is_file: &dyn Fn(&Path) -> bool,
) -> Result<PathBuf, BadUse> {
    if let Some(named) = named {
        return match is_file(named) {
            true => Ok(named.to_owned()),
            false => Err(BadUse(format!(
                "{VARIABLE} {}: no such file; give the path of {LIBRARY}",
                named.display()
            ))),
        };
    }
    let places = ["", "../lib", "../lib/premap"].into_iter().zip(std::iter::repeat(directory));
    let places: Vec<_> =
        places.filter_map(|(place, directory)| Some(directory?.join(place).join(LIBRARY))).collect();
    places.into_iter().find(|place| is_file(place)).ok_or_else(|| {
        BadUse(format!(
            "{LIBRARY} is neither beside the premap command nor in ../lib; build it with `cargo build --release`, or name \
             it in {VARIABLE}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(named: Option<&str>, present: &[&str], expected: Option<&str>) {
        let is_file = |path: &Path| present.iter().any(|one| Path::new(one) == path);
        let chosen = choose(named.map(Path::new), Some(Path::new("/o/bin")), &is_file);
        assert_eq!(chosen.ok().as_deref(), expected.map(Path::new));
    }

    #[test]
    fn the_variable_comes_first_then_the_command_s_neighbours() {
        let beside = "/o/bin/libpremap_preload.so";
        let library = "/o/bin/../lib/libpremap_preload.so";
        check(None, &[beside, library], Some(beside));
        check(None, &[library], Some(library));
        check(
            None,
            &["/o/bin/../lib/premap/libpremap_preload.so"],
            Some("/o/bin/../lib/premap/libpremap_preload.so"),
        );
        check(Some("/x.so"), &["/x.so", beside], Some("/x.so"));
        check(Some("/x.so"), &[beside], None);
        check(None, &[], None);
    }
}
