//! The end of a command's output on a stream that stays open for the next command.
//!
//! Each of the lab's two output ports carries the bytes of one command after another. After the last byte of a
//! command the guest writes a terminator: a token drawn at random for this boot, the command's number and `;`. The
//! token can't be guessed by what runs in the guest, so any other byte belongs to the command, and the stream is
//! clean for binary data.

/// Splits what arrives on one port into the command's own bytes and the terminator.
pub(super) struct Stream {
    terminator: Vec<u8>,
    pending: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// A stream that ends after command `number` of the boot with this token.
    pub(super) fn new(token: &str, number: usize) -> Self {
        Self { terminator: format!("{token}:{number};").into_bytes(), pending: Vec::new(), ended: false }
    }

    /// Takes bytes that arrived, and returns those that are known to be the command's.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.pending.extend_from_slice(bytes);
        let length = self.terminator.len();
        if let Some(at) = self.pending.windows(length).position(|window| window == self.terminator) {
            self.ended = true;
            self.pending.truncate(at);
            return std::mem::take(&mut self.pending);
        }
        // Whatever could be a terminator's beginning is held back.
        let held = (1..length.min(self.pending.len() + 1))
            .rev()
            .find(|&held| self.pending.ends_with(&self.terminator[..held]))
            .unwrap_or(0);
        let rest = self.pending.split_off(self.pending.len() - held);
        std::mem::replace(&mut self.pending, rest)
    }

    /// Tells whether the terminator was seen.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(chunks: &[&str], expected: &str, ended: bool) {
        let mut stream = Stream::new("aab", 7);
        let got: Vec<u8> = chunks.iter().flat_map(|chunk| stream.push(chunk.as_bytes())).collect();
        assert_eq!(String::from_utf8_lossy(&got), expected, "{chunks:?}");
        assert_eq!(stream.ended(), ended, "{chunks:?}");
    }

    #[test]
    fn bytes_pass_until_the_terminator() {
        check(&["hello\naab:7;"], "hello\n", true);
        check(&["aab:7;"], "", true);
        check(&["hello"], "hello", false);
    }

    #[test]
    fn a_terminator_may_come_in_pieces() {
        check(&["x", "a", "a", "b:", "7", ";"], "x", true);
        check(&["xaa", "ab:7;"], "xa", true);
        check(&["aaaa", "ab:7;"], "aaa", true);
    }

    #[test]
    fn what_only_looks_like_one_is_passed_on() {
        check(&["aab:", "8;"], "aab:8;", false);
        check(&["aab:6;aab:7;"], "aab:6;", true);
        check(&["aab", "!"], "aab!", false);
    }
}
