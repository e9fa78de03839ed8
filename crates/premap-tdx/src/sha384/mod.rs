//! SHA-384, from whichever library the build chose.
//!
//! [`Sha384`] is the little that measuring asks of a library: hash bytes as they come, tell a value in between (hence
//! `Clone`), finish. Each library has its feature; [`DefaultSha384`] is the first compiled in of openssl, aws-lc, ring and
//! sha2, which is on unless turned off and so gives way to a library that was asked for.

use crate::digest::Digest;

#[cfg(feature = "aws-lc")]
mod aws_lc;
#[cfg(feature = "openssl")]
mod openssl;
#[cfg(feature = "ring")]
mod ring;
#[cfg(feature = "sha2")]
mod sha2;

#[cfg(feature = "aws-lc")]
pub use self::aws_lc::AwsLc;
#[cfg(feature = "openssl")]
pub use self::openssl::OpenSsl;
#[cfg(feature = "ring")]
pub use self::ring::Ring;
#[cfg(feature = "sha2")]
pub use self::sha2::Sha2;

/// A SHA-384 in progress. A clone goes on from the same state by itself.
pub trait Sha384: Clone {
    /// The library's name, as benchmarks and reports show it.
    const NAME: &'static str;

    /// Starts a hash.
    #[must_use]
    fn new() -> Self;

    /// Hashes more bytes.
    fn update(&mut self, bytes: &[u8]);

    /// Ends the hash and gives its value.
    fn finish(self) -> Digest;
}

/// The library that measures where the caller names none.
#[cfg(feature = "openssl")]
pub type DefaultSha384 = OpenSsl;
/// The library that measures where the caller names none.
#[cfg(all(feature = "aws-lc", not(feature = "openssl")))]
pub type DefaultSha384 = AwsLc;
/// The library that measures where the caller names none.
#[cfg(all(feature = "ring", not(any(feature = "openssl", feature = "aws-lc"))))]
pub type DefaultSha384 = Ring;
/// The library that measures where the caller names none.
#[cfg(all(feature = "sha2", not(any(feature = "openssl", feature = "aws-lc", feature = "ring"))))]
pub type DefaultSha384 = Sha2;

#[cfg(not(any(feature = "openssl", feature = "aws-lc", feature = "sha2", feature = "ring")))]
compile_error!(
    "premap-tdx needs a SHA-384: turn on one of the features sha2 (default), openssl, aws-lc, ring"
);

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-384 of "abc", from FIPS 180-2, appendix D.1.
    const ABC: &str =
        "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7";

    fn check<H: Sha384>() {
        let mut hash = H::new();
        hash.update(b"a");
        let mut fork = hash.clone();
        hash.update(b"bc");
        assert_eq!(hash.finish().to_string(), ABC, "{}", H::NAME);
        fork.update(b"b");
        fork.update(b"c");
        assert_eq!(fork.finish().to_string(), ABC, "{}", H::NAME);
    }

    #[test]
    fn every_library_compiled_in_agrees_with_the_standard() {
        #[cfg(feature = "aws-lc")]
        check::<AwsLc>();
        #[cfg(feature = "openssl")]
        check::<OpenSsl>();
        #[cfg(feature = "ring")]
        check::<Ring>();
        #[cfg(feature = "sha2")]
        check::<Sha2>();
        check::<DefaultSha384>();
    }
}
