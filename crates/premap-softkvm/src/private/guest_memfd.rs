//! guest_memfd: `KVM_CREATE_GUEST_MEMFD` and what can be done with its descriptor.
//!
//! **Protocol.** Who takes pages away (a hole, the end of the descriptor) begins an invalidation of every guest page that
//! is bound to them, unmaps these, takes them away and ends it. Bindings change under the slots lock.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use premap_address::{Gfn, Hva, PAGE_SIZE};
use premap_kvm::Errno;
use rustix::fs::FallocateFlags;

use super::bindings::{Binding, PrivateMemory, pages_of};
use super::memory::Memory;
use crate::machine::Machine;
use crate::memslots::SlotId;

/// Private memory of a VM. Dropping it closes the descriptor: its memory is gone, and guests that touch it get EFAULT.
///
/// On Linux it is a file descriptor with file operations of its own. No kernel gives a user-space KVM a way to see what is
/// done with a descriptor, so here it is a value with the same operations.
#[derive(Debug)]
pub struct GuestMemfd {
    file: Arc<File>,
}

impl GuestMemfd {
    /// The number of the descriptor: what `kvm_userspace_memory_region2` wants to know.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.file.memory.number()
    }

    /// The number of its inode, which no other file has.
    ///
    /// # Errors
    /// What `fstat(2)` gives.
    pub fn inode(&self) -> Result<u64, Errno> {
        self.file.memory.inode()
    }

    /// `fallocate(2)` on the descriptor: makes memory present, or gives it back. Offset and length are in bytes.
    ///
    /// # Errors
    /// EOPNOTSUPP: a mode without `FALLOC_FL_KEEP_SIZE`, or with anything but `FALLOC_FL_PUNCH_HOLE` beside it. EINVAL:
    /// length 0, offset or length not a multiple of 4 KiB or negative as a signed number, or memory wanted past the end.
    /// EFBIG: the end is beyond 2^63. ENOMEM.
    pub fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Errno> {
        let (from, length) = (i64::try_from(offset), i64::try_from(bytes));
        let (Ok(from), Ok(length @ 1..)) = (from, length) else { return Err(Errno::INVAL) };
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        // Modes that no file has are refused before the range is looked at, those that this one lacks after it.
        let punches = mode.contains(FallocateFlags::PUNCH_HOLE);
        if punches && (!mode.contains(FallocateFlags::KEEP_SIZE) || mode.contains(FallocateFlags::ZERO_RANGE))
        {
            return Err(Errno::OPNOTSUPP);
        }
        if from.checked_add(length).is_none() {
            return Err(Errno::FBIG);
        }
        if !mode.contains(FallocateFlags::KEEP_SIZE) || !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let pages = pages_of(offset, bytes)?;
        if punches {
            return self.file.withdraw(&pages, || self.file.memory.fallocate(mode, offset, bytes));
        }
        if pages.end > self.file.memory.pages() {
            return Err(Errno::INVAL);
        }
        self.file.memory.fallocate(mode, offset, bytes)
    }
}

impl Drop for GuestMemfd {
    fn drop(&mut self) {
        self.file.closed.store(true, Ordering::SeqCst);
        if let Some(machine) = self.file.machine.upgrade() {
            machine.guest_memfds.lock().remove(&self.number());
        }
        self.file.withdraw(&(0..self.file.memory.pages()), || self.file.bindings().clear());
    }
}

/// What lies behind a descriptor.
#[derive(Debug)]
pub(super) struct File {
    memory: Memory,
    machine: Weak<Machine>,
    closed: AtomicBool,
    bindings: Mutex<Vec<Binding>>,
}

impl File {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn hva(&self, page: u64) -> Hva {
        self.memory.hva(page)
    }

    pub(super) fn make_present(&self, first: u64, pages: u64) -> Result<(), Errno> {
        self.memory.fallocate(FallocateFlags::KEEP_SIZE, first * PAGE_SIZE, pages * PAGE_SIZE)
    }

    pub(super) fn bindings(&self) -> MutexGuard<'_, Vec<Binding>> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` while no guest has these pages of the file mapped.
    fn withdraw<R>(&self, pages: &std::ops::Range<u64>, change: impl FnOnce() -> R) -> R {
        let Some(machine) = self.machine.upgrade() else { return change() };
        let bound: Vec<std::ops::Range<Gfn>> =
            self.bindings().iter().filter_map(|binding| binding.guest_pages(pages)).collect();
        machine.invalidate(bound, change)
    }
}

/// A VM's descriptors by their numbers.
#[derive(Debug, Default)]
pub(crate) struct GuestMemfds(Mutex<BTreeMap<u32, Weak<File>>>);

impl GuestMemfds {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<File>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `KVM_CREATE_GUEST_MEMFD`.
    ///
    /// # Errors
    /// EINVAL: flags, or a size of 0 or one that is no multiple of 4 KiB.
    pub(crate) fn create(&self, machine: &Arc<Machine>, size: u64, flags: u64) -> Result<GuestMemfd, Errno> {
        if flags != 0 || size == 0 || i64::try_from(size).is_err() || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let file = Arc::new(File {
            memory: Memory::new(size / PAGE_SIZE)?,
            machine: Arc::downgrade(machine),
            closed: AtomicBool::new(false),
            bindings: Mutex::default(),
        });
        self.lock().insert(file.memory.number(), Arc::downgrade(&file));
        Ok(GuestMemfd { file })
    }

    /// Gives a slot a part of a file: `kvm_gmem_bind`.
    ///
    /// # Errors
    /// EBADF: no such descriptor. EINVAL: it is something else or another VM's, the part lies past its end, or another slot
    /// has some of it.
    pub(crate) fn bind(
        &self,
        number: u32,
        offset: u64,
        slot: SlotId,
        base: Gfn,
        pages: u64,
    ) -> Result<PrivateMemory, Errno> {
        let Some(file) = self.lock().get(&number).and_then(Weak::upgrade) else {
            let open = Path::new("/proc/self/fd").join(number.to_string()).symlink_metadata().is_ok();
            return Err(if open { Errno::INVAL } else { Errno::BADF });
        };
        let wanted = pages_of(offset, pages * PAGE_SIZE)?;
        if wanted.end > file.memory.pages() {
            return Err(Errno::INVAL);
        }
        let mut bindings = file.bindings();
        if bindings.iter().any(|other| other.guest_pages(&wanted).is_some()) {
            return Err(Errno::INVAL);
        }
        let first = wanted.start;
        bindings.push(Binding { slot, base, pages: wanted });
        Ok(PrivateMemory { file: Arc::downgrade(&file), first })
    }
}
