//! How much memory the host can still give.

use premap_guest::Backing;

use crate::failure::BadUse;
use crate::size::Size;

/// Refuses more memory than the host has available. Without `/proc` nothing is refused.
pub(crate) fn check(asked: Size, backing: Backing) -> Result<(), BadUse> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available(&text).map_or(Ok(()), |available| fits(asked, backing, available))
}

fn fits(asked: Size, backing: Backing, available: Size) -> Result<(), BadUse> {
    // A file's pages lie in the page cache, and the guest's writes copy them. Hugetlb pages are set apart already.
    let (needed, what) = match backing {
        Backing::Hugetlb => return Ok(()),
        Backing::File => (Size(asked.0.saturating_mul(2)), "a file and its copy take"),
        _ => (asked, "it takes"),
    };
    if needed <= available {
        return Ok(());
    }
    let share = available.0 / (needed.0 / asked.0.max(1)).max(1);
    // A power of two that leaves the host some room.
    let suggested = 1_u64 << (share / 2).max(4096).ilog2();
    Err(BadUse(format!(
        "--memory {}: {what} {needed}, and this host has {available} available; give less, such as {}",
        asked.flag(),
        Size(suggested).flag()
    )))
}

/// Reads MemAvailable from the text of `/proc/meminfo`.
fn available(meminfo: &str) -> Option<Size> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Size(kib.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kib() {
        assert_eq!(available("MemTotal:  8 kB\nMemAvailable:     2048 kB\n"), Some(Size(2 << 20)));
        assert_eq!(available("MemTotal:  8 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn too_much_is_refused_with_value_and_remedy() {
        let host = Size(3 << 30);
        assert!(fits(Size(3 << 30), Backing::Anonymous, host).is_ok());
        assert!(fits(Size(1 << 40), Backing::Hugetlb, host).is_ok());
        let error = fits(Size(4 << 30), Backing::Memfd, host).unwrap_err().to_string();
        assert_eq!(
            error,
            "--memory 4G: it takes 4 GiB, and this host has 3 GiB available; give less, such as 1G"
        );
        let error = fits(Size(2 << 30), Backing::File, host).unwrap_err().to_string();
        assert!(error.contains("take 4 GiB") && error.ends_with("such as 512M"), "{error}");
    }
}
