//! What a VM and its vCPUs share, and the order in which its locks are taken.
//!
//! **Lock order**, outermost first: the slots lock (`memslots`), the page limit (`shadow::limit`), the state of invalidations
//! (`invalidation`), the list of roots (`roots`), a section of the shadow MMU (`shadow`), leaf tables (premap-mmu), the lock of the shadow
//! pages (premap-mmu). A flush is completed with none of the latter five held; a section of `memslots` is entered with none
//! of them held either, and not by who holds the slots lock.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use premap_address::{Gfn, Gpa, Hva, PAGE_SIZE, PageSize};
use premap_kvm::Errno;
use premap_mmu::Leaves;
use rustix::process::{Pid, getpid};

use crate::config::{SoftConfig, Tdp, VmType};
use crate::host::{AddressSpace, Exclusivity};
use crate::invalidation::Invalidations;
use crate::memslots::{Memslots, Slot};
use crate::private::{Attributes, GuestMemfds, Kind};
use crate::profile::Rules;
use crate::role::Spaces;
use crate::roots::Roots;
use crate::shadow::Shadow;
use crate::tdx::{Td, TdxHost};

/// The state of a VM.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) config: SoftConfig,
    pub(crate) host: AddressSpace,
    pub(crate) slots: Memslots,
    pub(crate) attributes: Attributes,
    pub(crate) guest_memfds: GuestMemfds,
    pub(crate) roots: Roots,
    pub(crate) shadow: Arc<Shadow>,
    pub(crate) invalidations: Invalidations,
    /// What there is of a TD, in a VM of that type.
    pub(crate) td: Option<Td>,
    /// The quirks that were turned off.
    pub(crate) disabled_quirks: AtomicU64,
    pub(crate) vcpus: Mutex<BTreeSet<u32>>,
    /// Whose memory the slots are in.
    owner: Pid,
    dead: AtomicBool,
    /// Whether private pages may be shared with another process or address: then each is asked about.
    shares_pages: AtomicBool,
}

impl Machine {
    /// A machine, on a host with TDX if it is to be a TD.
    pub(crate) fn new(config: SoftConfig, tdx: Option<Arc<TdxHost>>) -> Result<Self, Errno> {
        let roots = Roots::default();
        let shadow = Arc::new(Shadow::new(roots.frames()));
        Ok(Self {
            config,
            host: AddressSpace::open()?,
            slots: Memslots::default(),
            attributes: Attributes::default(),
            guest_memfds: GuestMemfds::default(),
            roots,
            shadow,
            invalidations: Invalidations::default(),
            td: tdx.map(Td::new),
            disabled_quirks: AtomicU64::new(0),
            vcpus: Mutex::default(),
            owner: getpid(),
            dead: AtomicBool::new(false),
            shares_pages: AtomicBool::new(false),
        })
    }

    pub(crate) fn rules(&self) -> &'static Rules {
        self.config.profile.rules()
    }

    pub(crate) fn has_tdp(&self) -> bool {
        self.config.tdp != Tdp::Off
    }

    /// Whether pages of this VM can be private.
    pub(crate) fn has_private_memory(&self) -> bool {
        self.config.vm_type != VmType::Default
    }

    /// The kind of memory that a page has, and how many pages from it on have the same, at most `most`.
    pub(crate) fn kind_of(&self, gfn: Gfn, most: u64) -> (Kind, u64) {
        if self.has_private_memory() { self.attributes.run(gfn, most) } else { (Kind::Shared, most) }
    }

    /// The largest mapping that the slot and the pages' attributes permit at a page. What holds a
    /// table that is shadowed is mapped by itself.
    pub(crate) fn largest(&self, slot: &Slot, gfn: Gfn) -> PageSize {
        let untracked = |size: &PageSize| {
            let first = gfn.align_down(*size);
            !self.shadow.mmu.tracks(first..Gfn::new(first.number() + size.pages()))
        };
        let uniform = |size: &PageSize| {
            untracked(size) && (!self.has_private_memory() || self.attributes.are_uniform(gfn, *size))
        };
        let most = slot.largest(gfn);
        let sizes = PageSize::ALL.into_iter().rev().filter(|size| *size <= most);
        sizes.into_iter().find(uniform).unwrap_or(PageSize::Size4K)
    }

    /// Just past the last guest-physical address that the host's processor can address.
    pub(crate) fn gpa_end(&self) -> Gpa {
        Gpa::new(1 << self.config.physical_bits.get())
    }

    /// The check at the entry of every ioctl.
    ///
    /// # Errors
    /// EIO: the VM is dead, or another process asks.
    pub(crate) fn check_alive(&self) -> Result<(), Errno> {
        if self.is_dead() || getpid() != self.owner { Err(Errno::IO) } else { Ok(()) }
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// How private pages are asked about in bulk.
    pub(crate) fn exclusivity(&self) -> Exclusivity {
        if self.shares_pages.load(Ordering::Relaxed) { Exclusivity::Ask } else { Exclusivity::Assume }
    }

    pub(crate) fn assume_shared_pages(&self) {
        self.shares_pages.store(true, Ordering::Relaxed);
    }

    /// Begins an invalidation of host memory: from here to its end nothing of it is mapped at the second stage.
    pub(crate) fn begin_invalidation(&self, memory: &Range<Hva>) {
        self.invalidations.begin();
        let slots = self.slots.current();
        for slot in slots.iter() {
            if let Some(pages) = overlap(slot, memory) {
                // A TD's private pages do not lie there.
                self.invalidations.add(pages.clone());
                self.unmap_shared(Spaces::One(slot.id.space), &pages);
            }
        }
    }

    /// Runs `change` while none of these pages is mapped at the second stage.
    pub(crate) fn invalidate<R>(
        &self,
        pages: impl IntoIterator<Item = Range<Gfn>>,
        change: impl FnOnce() -> R,
    ) -> R {
        self.invalidations.begin();
        for pages in pages {
            self.invalidations.add(pages.clone());
            self.unmap(Spaces::All, &pages);
        }
        let result = change();
        self.invalidations.end();
        result
    }

    /// Takes the mappings of these pages away that are not a TD's private ones.
    fn unmap_shared(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.roots.unmap(spaces, pages);
        self.shadow.unmap(spaces, pages);
    }

    /// Takes every mapping of these pages away, shared and private.
    pub(crate) fn unmap(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.unmap_shared(spaces, pages);
        if let Some(td) = &self.td
            && td.unmap(pages).is_err()
        {
            // What KVM does about a bug, its own or the module's: KVM_BUG_ON.
            self.kill();
        }
    }

    /// Takes the permission to write these pages away.
    pub(crate) fn write_protect(&self, spaces: Spaces, pages: &Range<Gfn>) {
        self.roots.write_protect(spaces, pages);
        self.shadow.write_protect(spaces, pages);
    }

    /// What is mapped, by size.
    pub(crate) fn leaves(&self) -> Leaves {
        self.roots.leaves() + Leaves::of(PageSize::Size4K, self.shadow.mmu.leaves())
    }

    /// Ends an invalidation that was begun.
    pub(crate) fn end_invalidation(&self) {
        self.invalidations.end();
    }
}

/// The pages of a slot whose memory lies in the range, counting those of which only a part does.
fn overlap(slot: &Slot, memory: &Range<Hva>) -> Option<Range<Gfn>> {
    let end = slot.hva.wrapping_add(slot.pages * PAGE_SIZE);
    let (start, end) = (memory.start.max(slot.hva), memory.end.min(end));
    let bytes = end.checked_offset_from(start).filter(|bytes| *bytes > 0)?;
    let first = start.checked_offset_from(slot.hva)?;
    let gfn = |offset: u64| Gfn::new(slot.base.number() + offset);
    Some(gfn(first / PAGE_SIZE)..gfn((first + bytes).div_ceil(PAGE_SIZE)))
}
