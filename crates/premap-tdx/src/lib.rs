#![doc = include_str!("../README.md")]
//!
//! # Which SHA-384
//!
//! An MRTD is one serial hash, so the library that hashes decides how long measuring takes. Measured on an AMD EPYC with
//! AVX2 and without the SHA-512 instructions, in one run of
//! `cargo bench -p premap-tdx --bench td --features openssl,aws-lc,ring`; a measured page is 6,272 bytes:
//!
//! | feature | MB/s | a measured page | builds with |
//! |---|---|---|---|
//! | `openssl` | 542 | 11.6 us | libssl-dev and pkg-config (libcrypto.a is there too, for static linking) |
//! | `openssl-vendored` | the same code | | gcc, perl and make; minutes |
//! | `ring` | 382 | 16.4 us | gcc |
//! | `aws-lc` | 381 | 16.5 us | gcc; minutes |
//! | `sha2`, the default | 370 | 17.0 us | cargo alone |
//!
//! OpenSSL is 1.4 times as fast as the others, which differ by less than a run does from the next (graviola, measured
//! outside this crate, is among them). But it needs a library of the system, or its source built, so the default is the
//! one that builds anywhere and links into anything; turn `openssl` on where many images are measured. Around the
//! library, this crate costs 1 to 4 percent: headers and contents are gathered, a measured page's worth at a time,
//! instead of 33 calls a page.
//!
//! A VMM that has a library of its own implements [`Sha384`] in ten lines and passes it to [`measure_with`].
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
