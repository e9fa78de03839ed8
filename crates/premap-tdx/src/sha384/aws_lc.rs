//! AWS-LC, built from source by gcc in about two minutes.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA384};

use super::Sha384;
use crate::digest::Digest;

/// SHA-384 by the crate `aws-lc-rs`.
#[derive(Clone)]
pub struct AwsLc(Context);

impl Sha384 for AwsLc {
    const NAME: &'static str = "aws-lc";

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

impl fmt::Debug for AwsLc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsLc").finish_non_exhaustive()
    }
}
