//! The machine on which TDs run: its TDX module, its memory, its keys.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use premap_address::{Hpa, PAGE_SIZE, Pfn};
use premap_kvm::Errno;
use premap_tdx_module::seamcall::Counts;
use premap_tdx_module::{Config, Hkid, HpaRange, Module};

/// The first address of the machine's memory. Not zero, so that no page of a TD has the number zero.
const START: u64 = 1 << 20;

/// Pages set aside at once for single uses.
const SINGLES: u64 = 64;
/// A page, as a step.
const PAGE_BYTES: usize = PAGE_SIZE as usize;

/// A machine with TDX, shared by the VMs on it. Its memory costs nothing until it is touched.
#[derive(Debug)]
pub struct TdxHost {
    pub(super) module: Module,
    /// The first address that was never given.
    next: AtomicU64,
    end: u64,
    returned: Mutex<Vec<Hpa>>,
    /// Fresh pages for single uses, tables and control structures, which so lie together.
    singles: Mutex<Range<u64>>,
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
            singles: Mutex::new(0..0),
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
        let mut singles = lock(&self.singles);
        if singles.is_empty() {
            let run =
                [SINGLES, 1].into_iter().find_map(|pages| Some((self.allocate_run(pages).ok()?, pages)));
            let (start, pages) = run.ok_or(Errno::NOMEM)?;
            *singles = start.raw()..start.raw() + pages * PAGE_SIZE;
        }
        let page = Hpa::new(singles.start);
        singles.start += PAGE_SIZE;
        Ok(page)
    }

    /// Pages for a use of at most so many, which are not all needed at once.
    pub(super) fn supply(&self, most: u64) -> Supply<'_> {
        Supply { host: self, most, run: 0..0 }
    }

    /// So many pages that follow each other.
    fn allocate_run(&self, pages: u64) -> Result<Hpa, Errno> {
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

    /// Takes back pages of a run that were not used.
    fn free_run(&self, run: Range<u64>) {
        let pages = run.step_by(PAGE_BYTES).map(Hpa::new);
        lock(&self.returned).extend(pages);
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

/// Memory for one block of a TD's pages: what came back first, then a run of fresh pages, taken at once. What is left of it
/// goes back on drop.
#[derive(Debug)]
pub(super) struct Supply<'h> {
    host: &'h TdxHost,
    most: u64,
    run: Range<u64>,
}

impl Supply<'_> {
    pub(super) fn next(&mut self) -> Result<Hpa, Errno> {
        if self.run.is_empty() {
            if let Some(page) = lock(&self.host.returned).pop() {
                return Ok(page);
            }
            let Ok(start) = self.host.allocate_run(self.most.max(1)) else { return self.host.allocate() };
            self.run = start.raw()..start.raw() + self.most.max(1) * PAGE_SIZE;
        }
        let page = Hpa::new(self.run.start);
        self.run.start += PAGE_SIZE;
        self.most = self.most.saturating_sub(1);
        Ok(page)
    }
}

impl Drop for Supply<'_> {
    fn drop(&mut self) {
        if !self.run.is_empty() {
            self.host.free_run(self.run.clone());
        }
    }
}
