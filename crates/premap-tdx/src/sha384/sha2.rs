//! The RustCrypto project's `sha2`: pure Rust, picks AVX2 at run time.

use sha2::Digest as _;

use super::Sha384;
use crate::digest::Digest;

/// SHA-384 by the crate `sha2`.
#[derive(Clone, Debug)]
pub struct Sha2(sha2::Sha384);

impl Sha384 for Sha2 {
    const NAME: &'static str = "sha2";

    fn new() -> Self {
        Self(sha2::Sha384::new())
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}
