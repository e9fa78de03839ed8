//! Making pages present: what KVM's get_user_pages is to it.
// UNSAFETY: madvise. The two advices used make pages present as a touch would and change no content.
#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::ops::Range;

use premap_address::Hva;
use premap_kvm::Errno;
use rustix::mm::{Advice, madvise};

use super::Touch;

/// Why a page could not be got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nothing mapped there, no permission, beyond the end of the file, or no memory left: KVM says EFAULT to each.
    BadAddress,
    /// The page is poisoned: KVM sends SIGBUS and tries again.
    Poisoned,
    /// A signal came while it was waited for.
    Interrupted,
    /// Something passing: a fatal signal, or a mapping that changed meanwhile.
    Again,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::HWPOISON => Self::Poisoned,
            Errno::INTR | Errno::AGAIN => Self::Again,
            _ => Self::BadAddress,
        }
    }
}

pub(crate) fn populate(range: Range<Hva>, touch: Touch) -> Result<(), Failure> {
    let advice = match touch {
        Touch::Read => Advice::LinuxPopulateRead,
        Touch::Write => Advice::LinuxPopulateWrite,
    };
    let bytes = range.end.checked_offset_from(range.start).ok_or(Failure::BadAddress)?;
    let (Ok(start), Ok(bytes)) = (usize::try_from(range.start.raw()), usize::try_from(bytes)) else {
        return Err(Failure::BadAddress);
    };
    // SAFETY: both advices touch the pages of the range as a load, or as a store of what is there already, would: no
    // content changes, no mapping goes, and what is not mapped is told by an errno. So no reference to any memory, in or
    // out of the range, is affected.
    unsafe { madvise(std::ptr::without_provenance_mut(start), bytes, advice) }.map_err(Failure::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_of_a_populate_has_the_meaning_that_kvm_gives_it() {
        for (errno, failure) in [
            (Errno::NOMEM, Failure::BadAddress),
            (Errno::FAULT, Failure::BadAddress),
            (Errno::INVAL, Failure::BadAddress),
            (Errno::HWPOISON, Failure::Poisoned),
            (Errno::INTR, Failure::Again),
            (Errno::AGAIN, Failure::Again),
        ] {
            assert_eq!(Failure::from(errno), failure, "{errno}");
        }
    }
}
