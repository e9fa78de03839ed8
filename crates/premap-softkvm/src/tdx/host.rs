//! The machine on which TDs run: its TDX module, its memory, its keys.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use premap_address::{Hpa, PAGE_SIZE, Pfn};
use premap_kvm::Errno;
use premap_tdx_module::seamcall::Counts;
use premap_tdx_module::{Config, Hkid, HpaRange, Module};

/// The first address of the machine's memory. Not zero, so that no page of a TD has the number zero.
const START: u64 = 1 << 20;

/// A machine with TDX, shared by the VMs on it. Its memory costs nothing until it is touched.
#[derive(Debug)]
pub struct TdxHost {
    pub(super) module: Module,
    /// The first address that was never given.
    next: AtomicU64,
    end: u64,
    returned: Mutex<Vec<Hpa>>,
    keys: Mutex<Vec<Hkid>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TdxHost {
    /// A machine with so many bytes of memory for TDs.
    ///
    /// # Errors
    /// EINVAL: no multiple of 4 KiB, none at all, or more than addresses reach.
    pub fn new(bytes: u64) -> Result<Arc<Self>, Errno> {
        let memory = HpaRange::new(Hpa::new(START), bytes).ok_or(Errno::INVAL)?;
        let module = Module::new(&Config::new(memory)).map_err(|_| Errno::INVAL)?;
        let keys = module.keys().private.clone().rev().map(Hkid).collect();
        Ok(Arc::new(Self {
            module,
            next: AtomicU64::new(START),
            end: memory.end().raw(),
            returned: Mutex::default(),
            keys: Mutex::new(keys),
        }))
    }

    /// The SEAMCALLs made so far, of all VMs.
    #[must_use]
    pub fn seamcalls(&self) -> Counts {
        self.module.counts()
    }

    /// A page of memory, of any content.
    pub(super) fn allocate(&self) -> Result<Hpa, Errno> {
        if let Some(page) = lock(&self.returned).pop() {
            return Ok(page);
        }
        self.allocate_run(1)
    }

    /// So many pages that follow each other.
    pub(super) fn allocate_run(&self, pages: u64) -> Result<Hpa, Errno> {
        let bytes = pages * PAGE_SIZE;
        let taken = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            next.checked_add(bytes).filter(|end| *end <= self.end)
        });
        taken.map(Hpa::new).map_err(|_| Errno::NOMEM)
    }

    /// Takes a page back that no TD has any more.
    pub(super) fn free(&self, page: Hpa) {
        lock(&self.returned).push(page);
    }

    /// A key that no TD has.
    pub(super) fn take_key(&self) -> Result<Hkid, Errno> {
        lock(&self.keys).pop().ok_or(Errno::NOSPC)
    }

    pub(super) fn return_key(&self, key: Hkid) {
        lock(&self.keys).push(key);
    }

    /// Whether a TD has the page, as the module says.
    pub(super) fn is_given(&self, page: Pfn, tdr: Hpa) -> bool {
        self.module.page_record(page).is_some_and(|record| record.owner == Some(tdr.frame()))
    }
}
