//! OpenSSL's libcrypto: the system's (libssl-dev), or built from source (feature `openssl-vendored`).

use std::fmt;

use super::Sha384;
use crate::digest::Digest;

/// SHA-384 by OpenSSL.
#[derive(Clone)]
pub struct OpenSsl(openssl::sha::Sha384);

impl Sha384 for OpenSsl {
    const NAME: &'static str = "openssl";

    fn new() -> Self {
        Self(openssl::sha::Sha384::new())
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(self) -> Digest {
        Digest(self.0.finish())
    }
}

impl fmt::Debug for OpenSsl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenSsl").finish_non_exhaustive()
    }
}
