//! The host's own access to memory, with a shared key.

use premap_address::{Hpa, Pfn};

use super::page::{BYTES, Page};
use crate::Module;
use crate::pamt::PageType;

/// Why the host may not read or write memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostAccessError {
    /// There is no memory there.
    #[error("there is no memory at hpa {0}")]
    NoMemory(Hpa),
    /// The page is a TD's, or holds what was a TD's and nobody has written since.
    #[error("the page at hpa {0} is under a private key: reclaim and overwrite it first")]
    Private(Hpa),
}

impl Module {
    /// Reads memory as the host, from `hpa` on, which has no HKID.
    ///
    /// # Errors
    /// A page is a TD's or there is none. The pages before it were read.
    pub fn host_read(&self, hpa: Hpa, bytes: &mut [u8]) -> Result<(), HostAccessError> {
        let mut rest = bytes;
        for (at, frame, offset, len) in pieces(hpa, rest.len()) {
            let (piece, tail) = rest.split_at_mut(len);
            rest = tail;
            let read = self.as_host(frame, |page, is_hosts| {
                if is_hosts {
                    page.read(offset, piece);
                }
                is_hosts
            });
            match read {
                Some(true) => {}
                Some(false) => return Err(HostAccessError::Private(at)),
                None => return Err(HostAccessError::NoMemory(at)),
            }
        }
        Ok(())
    }

    /// Writes memory as the host, from `hpa` on, which has no HKID. A page that was a TD's is cleared first, as the host must
    /// do on hardware before it uses such a page again.
    ///
    /// # Errors
    /// A page is a TD's or there is none. The pages before it were written.
    pub fn host_write(&self, hpa: Hpa, bytes: &[u8]) -> Result<(), HostAccessError> {
        let mut rest = bytes;
        for (at, frame, offset, len) in pieces(hpa, bytes.len()) {
            let (piece, tail) = rest.split_at(len);
            rest = tail;
            let page = self.memory.get(frame).ok_or(HostAccessError::NoMemory(at))?;
            let Some(entry) = self.pamt.entry(frame) else {
                page.write(offset, piece);
                continue;
            };
            let mut held = entry.hold_for_host().filter(|held| held.kind() == PageType::Nda);
            let held = held.as_mut().ok_or(HostAccessError::Private(at))?;
            if held.is_stale() {
                page.zero();
                held.refreshed();
            }
            page.write(offset, piece);
        }
        Ok(())
    }

    /// The bytes of a page as the host sees them: a TD's reads as zeros. `None` where there is no memory.
    pub(crate) fn page_as_host_sees_it(&self, frame: Pfn) -> Option<[u8; BYTES]> {
        let mut bytes = [0; BYTES];
        self.as_host(frame, |page, is_hosts| {
            if is_hosts {
                page.read(0, &mut bytes);
            }
        })?;
        Some(bytes)
    }

    /// Looks at a page while its owner can't change; `true` if the content is the host's.
    fn as_host<R>(&self, frame: Pfn, look: impl FnOnce(&Page, bool) -> R) -> Option<R> {
        let page = self.memory.get(frame)?;
        let Some(entry) = self.pamt.entry(frame) else { return Some(look(page, true)) };
        match entry.hold_for_host() {
            Some(held) => Some(look(page, held.kind() == PageType::Nda && !held.is_stale())),
            // A call is about to give the page to a TD, or to take it.
            None => Some(look(page, false)),
        }
    }
}

/// Cuts a range of bytes at page boundaries: address, frame, offset in it, length.
fn pieces(hpa: Hpa, len: usize) -> impl Iterator<Item = (Hpa, Pfn, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = hpa.wrapping_add(done as u64);
        #[expect(clippy::cast_possible_truncation, reason = "below a page's size")]
        let offset = at.page_offset() as usize;
        let piece = (len - done).min(BYTES - offset);
        done += piece;
        (piece > 0).then_some((at, at.frame(), offset, piece))
    })
}
