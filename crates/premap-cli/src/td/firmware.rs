//! Firmware files, which are untrusted.

use std::path::Path;

use premap_tdx::Image;

use crate::files::{self, Kind};

/// Reads a firmware: one file, or CODE and its VARS.
pub(super) fn read(file: &Path, vars: Option<&Path>) -> anyhow::Result<Image<'static>> {
    let code = bytes(file)?;
    match vars {
        Some(vars) => Ok(Image::join(&bytes(vars)?, &code)),
        None => Ok(Image::new(code)),
    }
}

fn bytes(file: &Path) -> anyhow::Result<Vec<u8>> {
    files::read(file, &file.display().to_string(), Kind::FIRMWARE)
}
