//! Memory whose pages come when a handler says so.
// UNSAFETY: the userfaultfd ioctls on memory of the test's own.
#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::os::fd::FromRawFd;

use premap_address::PAGE_SIZE;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::guest::Memory;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

const GROUP: u8 = 0xaa;
const UFFDIO_API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(GROUP, 4);

/// The handler's end. Closing it lets every waiting touch go on.
pub(crate) struct Handler(File);

impl Handler {
    /// Takes over all of `memory`, or gives `None` and says why where this machine does not let us.
    pub(crate) fn register(memory: &Memory) -> Option<Self> {
        // SAFETY: userfaultfd takes flags by value and gives a new descriptor, which is then ours alone.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let Some(number) = i32::try_from(number).ok().filter(|number| *number >= 0) else {
            println!("skipped: userfaultfd: {}", std::io::Error::last_os_error());
            return None;
        };
        // SAFETY: as above.
        let file = unsafe { File::from_raw_fd(number) };
        let mut api = Api { api: GROUP.into(), ..Api::default() };
        let range = memory.range(0..memory.pages());
        let mut register =
            Register { start: range.start.raw(), len: memory.pages() * PAGE_SIZE, mode: 1, ioctls: 0 };
        // SAFETY: both requests read and write one struct of the type that they are declared with.
        let registered = unsafe {
            ioctl(&file, Updater::<UFFDIO_API, _>::new(&mut api))
                .and_then(|()| ioctl(&file, Updater::<UFFDIO_REGISTER, _>::new(&mut register)))
        };
        if let Err(errno) = registered {
            println!("skipped: userfaultfd: {errno}");
            return None;
        }
        Some(Self(file))
    }

    /// Gives all of `memory` zero pages.
    pub(crate) fn resolve(&self, memory: &Memory) {
        let range = memory.range(0..memory.pages());
        let mut zero =
            ZeroPage { start: range.start.raw(), len: memory.pages() * PAGE_SIZE, ..ZeroPage::default() };
        // SAFETY: the request reads and writes one uffdio_zeropage, and puts pages only where none are.
        unsafe { ioctl(&self.0, Updater::<UFFDIO_ZEROPAGE, _>::new(&mut zero)) }
            .unwrap_or_else(|errno| panic!("UFFDIO_ZEROPAGE: {errno}"));
    }
}
