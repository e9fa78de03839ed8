//! The MRTD: what a TD's initial memory measures to, known before the TD is built.
//!
//! A TD has one SHA-384 that starts when the TD is initialised. Two operations feed it, and nothing else does:
//!
//! | operation | bytes hashed |
//! |---|---|
//! | TDH.MEM.PAGE.ADD of a 4 KiB page | 128: `MEM.PAGE.ADD`, zeros to 15, GPA little-endian at 16, zeros |
//! | TDH.MR.EXTEND of 256 bytes | 128: `MR.EXTEND`, zeros to 15, GPA at 16, zeros; then the 256 bytes of content |
//!
//! Adding a page hashes its address and not its content; a page's content counts only by the sixteen EXTENDs that cover
//! it. A measured page so costs 128 + 16 (128 + 256) = 6,272 hashed bytes. TDH.MR.FINALIZE ends the hash, and its value is
//! the MRTD. Memory added later (PAGE.AUG), page tables, attributes and XFAM are not in it.
//!
//! **The order of the operations changes the value, and VMMs differ in it** ([`Order`]): a value that somebody reports
//! can't be checked without knowing theirs, so [`search`] tries every set of [`Rules`] and says which fits, and
//! [`write_events`] writes what was hashed, with the value so far every 2 MiB, for the case that none does.
//!
//! ```text
//!   sections --events(rules)--> ADD gpa | EXTEND gpa content --Mrtd--> digest
//! ```
//!
//! Source: Intel TDX Module 1.5 base and ABI specifications, TDH.MEM.PAGE.ADD, TDH.MR.EXTEND, TDH.MR.FINALIZE.

mod event;
mod list;
mod mrtd;
mod rules;

use crate::digest::Digest;
use crate::sha384::{DefaultSha384, Sha384};
use crate::tdvf::Section;

pub use event::{CHUNK, Chunk, Event, events};
pub use list::write_events;
pub use mrtd::Mrtd;
pub use rules::{Order, PageAug, Rules};

/// An MRTD and what went into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// The value.
    pub mrtd: Digest,
    /// How many pages were added.
    pub adds: u64,
    /// How many pieces of 256 bytes were measured.
    pub extends: u64,
}

/// Measures the sections of a firmware as a VMM of these rules loads them.
#[must_use]
pub fn measure(sections: &[Section<'_>], rules: Rules) -> Measurement {
    measure_with::<DefaultSha384>(sections, rules)
}

/// Measures with a SHA-384 of the caller's choice.
#[must_use]
pub fn measure_with<H: Sha384>(sections: &[Section<'_>], rules: Rules) -> Measurement {
    let mut mrtd = Mrtd::<H>::new();
    events(sections, rules).for_each(|event| mrtd.record(&event));
    mrtd.finish()
}

/// What came of trying every set of rules against a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    /// The rules whose measurement is the value, if there are any.
    pub fits: Option<(Rules, Measurement)>,
    /// Every set of rules that was tried, in that order.
    pub tried: Vec<(Rules, Measurement)>,
}

/// Tries every set of rules that makes a difference for these sections, until one gives the expected value.
#[must_use]
pub fn search(sections: &[Section<'_>], expected: &Digest) -> Search {
    let mut tried = Vec::new();
    for rules in Rules::all(sections) {
        let measurement = measure(sections, rules);
        tried.push((rules, measurement));
        if measurement.mrtd == *expected {
            return Search { fits: Some((rules, measurement)), tried };
        }
    }
    Search { fits: None, tried }
}
