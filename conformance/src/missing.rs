//! Pages that user space is to provide: whoever touches one waits (userfaultfd).
// UNSAFETY: userfaultfd and two of its ioctls, whose structs are written out here.
#![expect(unsafe_code, reason = "ioctls on a userfaultfd")]

use std::ops::Range;
use std::os::fd::OwnedFd;

use premap_guest::Memory;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::fixture::PAGE;

/// Pages of guest memory that wait, if they are not there yet, until this is dropped.
#[derive(Debug)]
pub struct Missing {
    _uffd: OwnedFd,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const API: u32 = opcode::read_write::<Api>(0xaa, 0x3f);
const REGISTER: u32 = opcode::read_write::<Register>(0xaa, 0x00);
const VERSION: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

impl Missing {
    /// Watches some pages of the memory.
    ///
    /// # Errors
    /// ENOSYS or EPERM where this process can have no userfaultfd that sees what the kernel itself touches.
    pub fn watch(memory: &Memory, pages: Range<u64>) -> Result<Self, Errno> {
        // SAFETY: nothing waits before a range is registered, and then it is guest memory, reached by nobody but a guest and
        // this scenario, until the descriptor is closed.
        let uffd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let mut api = Api { api: VERSION, features: 0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one uffdio_api.
        unsafe { ioctl(&uffd, Updater::<API, _>::new(&mut api)) }?;
        let mut register = Register {
            start: memory.hva().raw() + pages.start * PAGE,
            len: (pages.end - pages.start) * PAGE,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register; the content of no page changes.
        unsafe { ioctl(&uffd, Updater::<REGISTER, _>::new(&mut register)) }?;
        Ok(Self { _uffd: uffd })
    }
}
