//! What the guest writes to its serial line.

use std::io;

/// What is kept of the console: enough for the whole boot of a talkative kernel.
const KEPT: usize = 1 << 20;

/// Takes the console's bytes, keeps the last of them, and looks for the marker.
#[derive(Debug, Default)]
pub(crate) struct Console {
    text: Vec<u8>,
    marker: Vec<u8>,
    seen: bool,
}

impl Console {
    /// Looks for `marker` from now on; an empty one is never seen.
    pub(crate) fn look_for(&mut self, marker: &str) {
        self.marker = marker.as_bytes().to_vec();
        self.seen = false;
    }

    /// Whether the marker came.
    pub(crate) fn has_marker(&self) -> bool {
        self.seen
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }
}

impl io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if self.text.len() == KEPT {
                self.text.drain(..KEPT / 2);
            }
            self.text.push(*byte);
            self.seen |= !self.marker.is_empty() && self.text.ends_with(&self.marker);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_marker_is_seen_once_its_last_byte_came() {
        let mut console = Console::default();
        console.look_for("is up");
        console.write_all(b"it is u").unwrap();
        assert!(!console.has_marker());
        console.write_all(b"p\n").unwrap();
        assert!(console.has_marker());
        assert_eq!(console.text(), "it is up\n");
    }

    #[test]
    fn no_marker_is_never_seen_and_a_long_console_keeps_its_end() {
        let mut console = Console::default();
        console.write_all(&b"x".repeat(KEPT)).unwrap();
        console.write_all(b"end").unwrap();
        assert!(!console.has_marker());
        assert!(console.text().ends_with("xend") && console.text().len() <= KEPT);
    }
}
