//! The machine on which TDs run: its TDX module, its memory, its keys.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use premap_address::{Gfn, Hpa, PAGE_SIZE, Pfn};
use premap_kvm::Errno;
use premap_tdx_module::seamcall::Counts;
use premap_tdx_module::{Config, Hkid, HpaRange, Module};

use super::lock;
use super::shards::Shards;

/// The first address of the machine's memory. Not zero, so that no page of a TD has the number zero.
const START: u64 = 1 << 20;

/// As much memory as 32 bits of frame number reach.
const MOST: u64 = PAGE_SIZE << 32;
/// Pages set aside at once for a stretch of guest memory: 2 MiB.
const RUN: u64 = 512;
/// Pages set aside at once for single uses.
const SINGLES: u64 = 64;

/// A machine with TDX, shared by the VMs on it. Its memory costs nothing until it is touched.
#[derive(Debug)]
pub struct TdxHost {
    pub(super) module: Module,
    /// The first address that was never given.
    next: AtomicU64,
    end: u64,
    returned: Mutex<Vec<Hpa>>,
    /// How many there are of these, to be asked without the lock.
    waiting: AtomicUsize,
    /// Fresh pages of each stretch of guest memory, for its pages.
    fresh: Shards<Range<u64>>,
    /// Fresh pages for single uses, tables and control structures, which so lie together.
    singles: Mutex<Range<u64>>,
    keys: Mutex<Vec<Hkid>>,
}

impl TdxHost {
    /// A machine with so many bytes of memory for TDs.
    ///
    /// # Errors
    /// EINVAL: no multiple of 4 KiB, none at all, or more than 16 TiB.
    pub fn new(bytes: u64) -> Result<Arc<Self>, Errno> {
        let memory = HpaRange::new(Hpa::new(START), bytes).ok_or(Errno::INVAL)?;
        if memory.end().raw() > MOST {
            return Err(Errno::INVAL);
        }
        let module = Module::new(&Config::new(memory)).map_err(|_| Errno::INVAL)?;
        let keys = module.keys().private.clone().rev().map(Hkid).collect();
        Ok(Arc::new(Self {
            module,
            next: AtomicU64::new(START),
            end: memory.end().raw(),
            returned: Mutex::default(),
            waiting: AtomicUsize::new(0),
            fresh: Shards::default(),
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
        if let Some(page) = self.used() {
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

    /// A page that came back.
    fn used(&self) -> Option<Hpa> {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let page = lock(&self.returned).pop();
        self.waiting.fetch_sub(usize::from(page.is_some()), Ordering::Relaxed);
        page
    }

    /// Memory for pages of the guest from `gfn` on. Pages of the same stretch wait until it is dropped.
    pub(super) fn supply(&self, gfn: Gfn) -> Supply<'_> {
        Supply { host: self, fresh: self.fresh.of(gfn) }
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
        self.waiting.fetch_add(1, Ordering::Relaxed);
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

/// Memory for a TD's pages: what came back first, then fresh pages, taken many at once.
#[derive(Debug)]
pub(super) struct Supply<'h> {
    host: &'h TdxHost,
    fresh: MutexGuard<'h, Range<u64>>,
}

impl Supply<'_> {
    pub(super) fn next(&mut self) -> Result<Hpa, Errno> {
        if let Some(page) = self.host.used() {
            return Ok(page);
        }
        if self.fresh.is_empty() {
            // Where memory runs out, what other stretches set aside stays with them.
            let Ok(start) = self.host.allocate_run(RUN) else { return self.host.allocate() };
            *self.fresh = start.raw()..start.raw() + RUN * PAGE_SIZE;
        }
        let page = Hpa::new(self.fresh.start);
        self.fresh.start += PAGE_SIZE;
        Ok(page)
    }
}
