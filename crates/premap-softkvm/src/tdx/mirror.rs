//! The mirror's other side: each change of it is a SEAMCALL first.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use premap_address::{Gpa, Hpa, PageSize, Pfn};
use premap_kvm::Errno;
use premap_mmu::Mirror;
use premap_tdx_module::{Failure, Level, PageInfo};

use super::errors::insist;
use super::host::TdxHost;
use super::shards::Shards;
use super::{Page, lock};

/// The Secure-EPT of a TD, as the module has it.
#[derive(Debug)]
pub(super) struct Secure {
    pub(super) host: Arc<TdxHost>,
    pub(super) tdr: Hpa,
    /// Whether the TD can run: from then on pages come in by PAGE.AUG.
    runnable: AtomicBool,
    /// The source of the page that is being added, where the profile passes it through the VM: `page_add_src`.
    pub(super) source: Mutex<Option<Box<Page>>>,
    /// How many changes wait for vCPUs to exit.
    kicks: AtomicUsize,
    /// Secure-EPT pages by what they span: first address and level.
    tables: Shards<HashMap<(Gpa, u8), Hpa>>,
}

/// Why the Secure-EPT stays as it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Refusal {
    /// The module said so.
    Module(Failure),
    /// The host has no memory.
    Host(Errno),
    /// A page that was not added is not to be present before the TD can run.
    NotAdded,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Module(failure)
    }
}

impl Secure {
    pub(super) fn new(host: Arc<TdxHost>, tdr: Hpa) -> Self {
        Self {
            host,
            tdr,
            runnable: AtomicBool::new(false),
            source: Mutex::default(),
            kicks: AtomicUsize::new(0),
            tables: Shards::default(),
        }
    }

    pub(super) fn is_runnable(&self) -> bool {
        self.runnable.load(Ordering::Acquire)
    }

    pub(super) fn set_runnable(&self) {
        self.runnable.store(true, Ordering::Release);
    }

    /// Takes every Secure-EPT page out of the books.
    pub(super) fn take_tables(&self) -> Vec<Hpa> {
        self.tables.iter().flat_map(|mut tables| std::mem::take(&mut *tables).into_values()).collect()
    }

    /// Whether a vCPU that runs should leave the guest and come back: KVM's request to exit.
    pub(super) fn wants_exits(&self) -> bool {
        self.kicks.load(Ordering::Acquire) > 0
    }

    /// Runs `remove` on an entry that no vCPU uses any more: while the TD can run it is blocked first, and a TLB epoch goes
    /// by, for which running vCPUs must exit.
    fn after_blocking<T>(
        &self,
        page: PageInfo,
        remove: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if !self.is_runnable() {
            return insist(remove);
        }
        self.kicks.fetch_add(1, Ordering::AcqRel);
        let (module, tdr) = (&self.host.module, self.tdr);
        let removed = insist(|| module.mem_range_block(page, tdr)).and_then(|()| {
            let removed = insist(|| module.mem_track(tdr)).and_then(|()| insist(remove));
            removed.inspect_err(|_| {
                // It stays, so the guest may use it again: once an epoch has gone by, whether that was what failed or not.
                let unblocked = insist(|| module.mem_track(tdr))
                    .and_then(|()| insist(|| module.mem_range_unblock(page, tdr)));
                debug_assert!(unblocked.is_ok(), "{unblocked:?}");
            })
        });
        self.kicks.fetch_sub(1, Ordering::AcqRel);
        removed
    }

    /// Takes a page back that the TD no longer has. One whose cache lines can't be written back is never used again.
    fn reuse(&self, page: Hpa) {
        if insist(|| self.host.module.phymem_page_wbinvd(page)).is_ok() {
            self.host.free(page);
        }
    }
}

fn info(gpa: Gpa, level: u8) -> PageInfo {
    PageInfo::new(gpa, Level::new(level).unwrap_or(Level::PML5))
}

impl Mirror for Secure {
    type Refusal = Refusal;

    fn link_table(&self, gpa: Gpa, level: u8, _: Pfn) -> Result<(), Refusal> {
        let table = self.host.allocate().map_err(Refusal::Host)?;
        if let Err(failure) = self.host.module.mem_sept_add(info(gpa, level), self.tdr, table) {
            self.host.free(table);
            return Err(failure.into());
        }
        self.tables.of(gpa.frame()).insert((gpa, level), table);
        Ok(())
    }

    fn set_leaf(&self, gpa: Gpa, _: PageSize, pfn: Pfn) -> Result<(), Refusal> {
        let (page, memory) = (PageInfo::page(gpa), pfn.address());
        if self.is_runnable() {
            return Ok(self.host.module.mem_page_aug(page, self.tdr, memory)?);
        }
        match &*lock(&self.source) {
            Some(source) => Ok(self.host.module.mem_page_add(page, self.tdr, memory, &**source)?),
            // It was added with its source a moment ago, under the lock that is held now.
            None if self.host.is_given(pfn, self.tdr) => Ok(()),
            None => Err(Refusal::NotAdded),
        }
    }

    fn remove_leaf(&self, gpa: Gpa, _: PageSize, pfn: Pfn) -> Result<(), Refusal> {
        let page = PageInfo::page(gpa);
        self.after_blocking(page, || self.host.module.mem_page_remove(page, self.tdr))?;
        self.reuse(pfn.address());
        Ok(())
    }

    fn remove_table(&self, gpa: Gpa, level: u8, _: Pfn) -> Result<(), Refusal> {
        let entry = info(gpa, level);
        let table = self.after_blocking(entry, || self.host.module.mem_sept_remove(entry, self.tdr))?;
        self.tables.of(gpa.frame()).remove(&(gpa, level));
        self.reuse(table);
        Ok(())
    }
}
