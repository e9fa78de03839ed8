//! The hash itself: headers and contents, gathered so that the library gets many bytes a call.

use premap_address::{Gpa, PageSize};

use super::Measurement;
use super::event::{CHUNK, Chunk, Event};
use crate::digest::Digest;
use crate::sha384::{DefaultSha384, Sha384};

/// An operation's header.
const HEADER: usize = 128;
/// Where the address lies in it.
const ADDRESS: usize = 16;
/// What a measured page comes to, and so how much is gathered for one call of the library: 6,272 bytes stay in the
/// processor's nearest cache.
const BATCH: usize = HEADER + 16 * (HEADER + CHUNK);

const ADD: &[u8] = b"MEM.PAGE.ADD";
const EXTEND: &[u8] = b"MR.EXTEND";

/// An MRTD in progress: what the TDX module keeps for a TD between TDH.MNG.INIT and TDH.MR.FINALIZE.
#[derive(Clone, Debug)]
pub struct Mrtd<H: Sha384 = DefaultSha384> {
    hash: H,
    batch: [u8; BATCH],
    filled: usize,
    adds: u64,
    extends: u64,
}

impl<H: Sha384> Default for Mrtd<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H: Sha384> Mrtd<H> {
    /// Starts a measurement.
    #[must_use]
    pub fn new() -> Self {
        Self { hash: H::new(), batch: [0; BATCH], filled: 0, adds: 0, extends: 0 }
    }

    /// Records that the 4 KiB page that holds `gpa` was added.
    pub fn add(&mut self, gpa: Gpa) {
        self.adds += 1;
        let record = self.reserve(HEADER);
        header(record, ADD, gpa.align_down(PageSize::Size4K));
    }

    /// Records that the 256 bytes around `gpa` were measured, with this content.
    pub fn extend(&mut self, gpa: Gpa, content: Chunk<'_>) {
        self.extends += 1;
        let record = self.reserve(HEADER + CHUNK);
        let (head, body) = record.split_at_mut(HEADER);
        header(head, EXTEND, Gpa::new(gpa.raw() & !(CHUNK as u64 - 1)));
        let (stored, zeros) = body.split_at_mut(content.stored().len());
        stored.copy_from_slice(content.stored());
        zeros.fill(0);
    }

    /// Records an operation.
    pub fn record(&mut self, event: &Event<'_>) {
        match *event {
            Event::Add { gpa, .. } => self.add(gpa),
            Event::Extend { gpa, content, .. } => self.extend(gpa, content),
        }
    }

    /// The value that the MRTD would have if it ended here.
    #[must_use]
    pub fn so_far(&self) -> Measurement {
        self.clone().finish()
    }

    /// Ends the measurement.
    #[must_use]
    pub fn finish(mut self) -> Measurement {
        self.flush();
        let mrtd: Digest = self.hash.finish();
        Measurement { mrtd, adds: self.adds, extends: self.extends }
    }

    /// The next `len` bytes of the batch; `len` is one record's, so the batch has room once it is empty.
    fn reserve(&mut self, len: usize) -> &mut [u8] {
        if self.filled + len > BATCH {
            self.flush();
        }
        let start = self.filled;
        self.filled += len;
        &mut self.batch[start..self.filled]
    }

    fn flush(&mut self) {
        self.hash.update(&self.batch[..self.filled]);
        self.filled = 0;
    }
}

/// Writes an operation's header over whatever the 128 bytes held.
fn header(bytes: &mut [u8], name: &[u8], gpa: Gpa) {
    bytes.fill(0);
    bytes[..name.len()].copy_from_slice(name);
    bytes[ADDRESS..ADDRESS + 8].copy_from_slice(&gpa.raw().to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of one operation, put down by hand from the specification's table.
    fn by_hand(name: &str, gpa: u64, content: &[u8]) -> Vec<u8> {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(16, 0);
        bytes.extend(gpa.to_le_bytes());
        bytes.resize(128, 0);
        bytes.extend(content);
        bytes
    }

    fn sha384(bytes: &[u8]) -> Digest {
        let mut hash = DefaultSha384::new();
        hash.update(bytes);
        hash.finish()
    }

    #[test]
    fn operations_hash_as_the_specification_lays_them_out() {
        let mut mrtd: Mrtd = Mrtd::new();
        mrtd.add(Gpa::new(0x80_9000));
        let mut expected = by_hand("MEM.PAGE.ADD", 0x80_9000, &[]);
        assert_eq!(mrtd.so_far().mrtd, sha384(&expected));
        mrtd.extend(Gpa::new(0x80_9100), Chunk::new(&[7; CHUNK]));
        expected.extend(by_hand("MR.EXTEND", 0x80_9100, &[7; CHUNK]));
        let measured = mrtd.finish();
        assert_eq!(measured, Measurement { mrtd: sha384(&expected), adds: 1, extends: 1 });
    }

    #[test]
    fn batches_of_any_mixture_hash_as_one_stream() {
        let (mut mrtd, mut expected) = (Mrtd::<DefaultSha384>::new(), Vec::new());
        for number in 0..200_u64 {
            let gpa = 0x1000 * number;
            if number % 3 == 0 {
                mrtd.add(Gpa::new(gpa));
                expected.extend(by_hand("MEM.PAGE.ADD", gpa, &[]));
            } else {
                let content = [0xa5; CHUNK];
                let stored = &content[..usize::try_from(number).unwrap()];
                mrtd.extend(Gpa::new(gpa), Chunk::new(stored));
                expected.extend(by_hand("MR.EXTEND", gpa, &Chunk::new(stored).bytes()));
            }
            assert_eq!(mrtd.so_far().mrtd, sha384(&expected));
        }
    }

    #[test]
    fn low_bits_of_an_address_do_not_count() {
        let mrtd = |add, extend| {
            let mut mrtd = Mrtd::<DefaultSha384>::new();
            mrtd.add(Gpa::new(add));
            mrtd.extend(Gpa::new(extend), Chunk::new(&[]));
            mrtd.finish()
        };
        assert_eq!(mrtd(0x1007, 0x21ff), mrtd(0x1000, 0x2100));
    }
}
