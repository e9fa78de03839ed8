//! What the guest's console tells when a boot goes wrong.

/// Returns the last lines of a console's log, control characters left out.
pub(super) fn tail(console: &[u8], count: usize) -> Vec<String> {
    let lines = lines(console);
    lines[lines.len().saturating_sub(count)..].to_vec()
}

/// Finds the line in which the kernel says why it gave up.
pub(super) fn cause(console: &[u8]) -> Option<String> {
    const SIGNS: [&str; 4] = ["Kernel panic", "BUG: ", "Oops: ", "Out of memory"];
    let lines = lines(console);
    SIGNS.iter().find_map(|sign| {
        let line = lines.iter().find(|line| line.contains(sign))?;
        Some(line[line.find(sign)?..].to_owned())
    })
}

/// Returns the last thing that QEMU itself said, its notes on features that it doesn't emulate left out.
pub(super) fn cause_in_qemu(log: &[u8]) -> Option<String> {
    lines(log).into_iter().rfind(|line| !line.contains("warning: "))
}

fn lines(text: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(text)
        .lines()
        .map(|line| line.chars().filter(|sign| !sign.is_control()).collect::<String>())
        .filter(|line| !line.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_and_the_tail_is_short() {
        let log = b"\x1bbooting\r\n[    1.2] Kernel panic - not syncing: no init\r\n[    1.3] end\r\n";
        assert_eq!(cause(log).as_deref(), Some("Kernel panic - not syncing: no init"));
        assert_eq!(tail(log, 1), ["[    1.3] end"]);
        assert_eq!(cause(b"fine\n"), None);
    }

    #[test]
    fn warnings_of_qemu_are_no_cause() {
        let log =
            b"qemu: warning: TCG doesn't support it\nqemu: cannot set up guest memory\nqemu: warning: more\n";
        assert_eq!(cause_in_qemu(log).as_deref(), Some("qemu: cannot set up guest memory"));
        assert_eq!(cause_in_qemu(b"qemu: warning: more\n"), None);
    }
}
