//! A firmware image: whole, or its two halves put together.

use std::borrow::Cow;

/// The bytes of a firmware image.
///
/// A VMM that keeps variables in a file of their own has the firmware as two files, VARS and CODE. The metadata in CODE
/// speak of the two in one, VARS first; [`join`](Self::join) makes that one image.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    bytes: Cow<'a, [u8]>,
    vars: Option<u64>,
}

impl<'a> Image<'a> {
    /// Takes a whole image.
    pub fn new(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        Self { bytes: bytes.into(), vars: None }
    }

    /// Puts a VARS file and a CODE file together.
    ///
    /// Whether they belong together is seen by [`Tdvf::parse`](super::Tdvf::parse): the metadata tell how long VARS is.
    #[must_use]
    pub fn join(vars: &[u8], code: &[u8]) -> Image<'static> {
        Image { bytes: Cow::Owned([vars, code].concat()), vars: Some(len(vars)) }
    }

    /// The image's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The length of the VARS that were joined, if the image is not one file.
    pub(super) fn vars(&self) -> Option<u64> {
        self.vars
    }
}

/// A length as the metadata count, in 64 bits.
pub(super) fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a slice's length fits 64 bits")
}
