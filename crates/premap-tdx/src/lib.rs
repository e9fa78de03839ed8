#![doc = include_str!("../README.md")]
//!
//! # Which SHA-384
//!
//! An MRTD is one serial hash, so the library that hashes decides how long measuring takes. `cargo bench -p premap-tdx
//! --bench td --features openssl,aws-lc,ring` measures those at hand.
//!
//! The default is `sha2`, the best of those that build with cargo alone. The features `openssl`, `aws-lc` and `ring`
//! choose another, `openssl-vendored` builds OpenSSL from source; a VMM that has a library of its own implements
//! [`Sha384`] in ten lines and passes it to [`measure_with`].
#![forbid(unsafe_code)]

pub mod hob;
pub mod measure;
pub mod sha384;
pub mod tdvf;

mod digest;

pub use digest::{Digest, DigestError};
pub use hob::{HobError, TdHob};
pub use measure::{Measurement, Mrtd, Order, PageAug, Rules, measure, measure_with};
pub use sha384::{DefaultSha384, Sha384};
pub use tdvf::{Attributes, Image, Section, SectionType, Tdvf, TdvfError};
