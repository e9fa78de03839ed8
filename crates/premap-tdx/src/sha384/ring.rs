//! BoringSSL's assembly as ring carries it; gcc builds it.

use std::fmt;

use ring::digest::{Context, SHA384};

use super::Sha384;
use crate::digest::Digest;

/// SHA-384 by the crate `ring`.
#[derive(Clone)]
pub struct Ring(Context);

impl Sha384 for Ring {
    const NAME: &'static str = "ring";

    fn new() -> Self {
        Self(Context::new(&SHA384))
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(self) -> Digest {
        let mut digest = [0; Digest::LEN];
        digest.copy_from_slice(self.0.finish().as_ref());
        Digest(digest)
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
