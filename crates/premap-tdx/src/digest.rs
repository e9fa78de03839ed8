//! A SHA-384 value, as hardware reports it and as people compare it.

use std::fmt;
use std::str::FromStr;

/// A SHA-384 value of 48 bytes: an MRTD, or what is extended into an RTMR.
///
/// Text is 96 hexadecimal digits, the first byte first; both cases are read and lower case is written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; Self::LEN]);

/// Why a text is no [`Digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// Not as many characters as a SHA-384 value has.
    #[error("a SHA-384 value has 96 hexadecimal digits, this has {found} characters")]
    Length {
        /// How many there are.
        found: usize,
    },
    /// A character that is no hexadecimal digit.
    #[error("character {position} ({found:?}) is not a hexadecimal digit")]
    Digit {
        /// Which character, counted from 1.
        position: usize,
        /// What it is.
        found: char,
    },
}

impl Digest {
    /// The length in bytes.
    pub const LEN: usize = 48;
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let found = text.chars().count();
        if found != 2 * Self::LEN {
            return Err(DigestError::Length { found });
        }
        let mut bytes = [0; Self::LEN];
        for (index, found) in text.chars().enumerate() {
            let digit = found.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            let digit = digit.ok_or(DigestError::Digit { position: index + 1, found })?;
            bytes[index / 2] = bytes[index / 2] << 4 | digit;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_value_convert_both_ways() {
        let text = "0123456789abcdef".repeat(6);
        let digest: Digest = text.parse().unwrap();
        assert_eq!(digest.0[..3], [0x01, 0x23, 0x45]);
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.to_uppercase().parse(), Ok(digest));
    }

    #[test]
    fn what_is_no_digest_is_refused_with_the_place() {
        assert_eq!("".parse::<Digest>(), Err(DigestError::Length { found: 0 }));
        assert_eq!("é".repeat(96).parse::<Digest>(), Err(DigestError::Digit { position: 1, found: 'é' }));
        let text = format!("{}x", "0".repeat(95));
        assert_eq!(text.parse::<Digest>(), Err(DigestError::Digit { position: 96, found: 'x' }));
    }
}
