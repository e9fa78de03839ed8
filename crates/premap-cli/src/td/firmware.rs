//! Firmware files: untrusted, and read no further than any firmware is long.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use premap_tdx::Image;

use crate::size::Size;

/// Longer than any firmware; what is longer, such as a device that never ends, is not read on.
const LONGEST: u64 = 64 << 20;

/// Reads a firmware: one file, or CODE and its VARS.
pub(super) fn read(file: &Path, vars: Option<&Path>) -> anyhow::Result<Image<'static>> {
    let code = bytes(file)?;
    match vars {
        Some(vars) => Ok(Image::join(&bytes(vars)?, &code)),
        None => Ok(Image::new(code)),
    }
}

fn bytes(file: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let name = || file.display().to_string();
    let opened = File::open(file).with_context(name)?;
    let length = opened.take(LONGEST + 1).read_to_end(&mut bytes).with_context(name)?;
    if u64::try_from(length).is_ok_and(|length| length > LONGEST) {
        bail!("{}: longer than {}, which no firmware is; give an OVMF image", name(), Size(LONGEST));
    }
    Ok(bytes)
}
