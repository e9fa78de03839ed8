//! A VM with real memory behind its slots, for the tests of this crate.
// UNSAFETY: maps memory and hands it to VMs. Each block argues that the memory outlives what uses it.
#![expect(unsafe_code, reason = "mmap, madvise and the traits' unsafe methods")]
#![allow(dead_code, clippy::allow_attributes, reason = "each test file uses a part of it")]
#![expect(clippy::unwrap_used, reason = "a test that can't set up its machine fails")]

pub(crate) mod tables;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use premap_address::{Gpa, Hva, PAGE_SIZE};
use premap_address_space::{AddressSpace, Exclusivity, State};
use premap_kvm::abi::{
    kvm_enable_cap, kvm_pre_fault_memory, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use premap_kvm::{Errno, Vcpu, Vm};
use premap_softkvm::{Profile, SoftConfig, SoftVcpu, SoftVm};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};

pub(crate) const HUGE: u64 = 2 << 20;

/// Memory of this process, at an address that is a multiple of 2 MiB. Unmapped on drop.
pub(crate) struct Memory {
    start: *mut std::ffi::c_void,
    bytes: usize,
    pub(crate) file: Option<OwnedFd>,
}

// SAFETY: the pointer is only an address here; what lies behind it is touched by system calls and guests alone.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

impl Memory {
    /// Private anonymous memory in small pages.
    pub(crate) fn anonymous(pages: u64) -> Self {
        let memory = Self::reserve(pages);
        memory.advise(0..pages, Advice::LinuxNoHugepage);
        memory
    }

    /// Private anonymous memory in huge pages, or `None` where the kernel gives none.
    pub(crate) fn huge(pages: u64) -> Option<Self> {
        let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
        if modes.contains("[never]") {
            println!("skipped: this kernel makes no transparent huge pages");
            return None;
        }
        let memory = Self::reserve(pages);
        memory.advise(0..pages, Advice::LinuxHugepage);
        Some(memory)
    }

    /// Memory of the huge page pool, private or shared, or `None` where the pool is too small.
    pub(crate) fn hugetlb(pages: u64, flags: MapFlags) -> Option<Self> {
        let memory = Self::reserve(pages);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = flags | MapFlags::FIXED | MapFlags::HUGETLB;
        // SAFETY: maps over the reservation just made, which nobody else knows.
        match unsafe { mmap_anonymous(memory.start, memory.bytes, protection, flags) } {
            Ok(_) => Some(memory),
            Err(errno) => {
                println!("skipped: no {pages} pages from the huge page pool: {errno}");
                None
            }
        }
    }

    /// A memfd, mapped shared.
    pub(crate) fn memfd(pages: u64) -> Self {
        Self::of_file(pages, MapFlags::SHARED)
    }

    /// A file, mapped private: the page cache until it is written.
    pub(crate) fn private_file(pages: u64) -> Self {
        Self::of_file(pages, MapFlags::PRIVATE)
    }

    fn of_file(pages: u64, flags: MapFlags) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages * PAGE_SIZE).unwrap();
        let mut memory = Self::reserve(pages);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: maps over the reservation just made, which nobody else knows.
        unsafe { mmap(memory.start, memory.bytes, protection, flags | MapFlags::FIXED, &file, 0) }.unwrap();
        memory.file = Some(file);
        memory
    }

    fn reserve(pages: u64) -> Self {
        let bytes = usize::try_from(pages * PAGE_SIZE).unwrap();
        let huge = usize::try_from(HUGE).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; then its unaligned ends, which nobody knows, go.
        unsafe {
            let start = mmap_anonymous(ptr::null_mut(), bytes + huge, protection, MapFlags::PRIVATE).unwrap();
            let skip = start.align_offset(huge);
            let aligned = start.byte_add(skip);
            if skip > 0 {
                munmap(start, skip).unwrap();
            }
            munmap(aligned.byte_add(bytes), huge - skip).unwrap();
            Self { start: aligned, bytes, file: None }
        }
    }

    pub(crate) fn hva(&self) -> Hva {
        Hva::new(self.start.addr() as u64)
    }

    /// How many of its pages the host has: zero pages too.
    pub(crate) fn present(&self) -> u64 {
        let host = AddressSpace::open().unwrap();
        let runs = host.query_all(self.range(0..self.pages()), Exclusivity::Assume).unwrap();
        runs.iter().filter(|run| run.state != State::Absent).map(|run| run.pages).sum()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes as u64 / PAGE_SIZE
    }

    pub(crate) fn range(&self, pages: Range<u64>) -> Range<Hva> {
        let at = |page: u64| self.hva().wrapping_add(page * PAGE_SIZE);
        at(pages.start)..at(pages.end)
    }

    fn part(&self, pages: &Range<u64>) -> (*mut std::ffi::c_void, usize) {
        assert!(pages.start <= pages.end && pages.end <= self.pages());
        let offset = usize::try_from(pages.start * PAGE_SIZE).unwrap();
        let bytes = usize::try_from((pages.end - pages.start) * PAGE_SIZE).unwrap();
        (self.start.wrapping_byte_add(offset), bytes)
    }

    pub(crate) fn advise(&self, pages: Range<u64>, advice: Advice) {
        let (start, bytes) = self.part(&pages);
        // SAFETY: the range is ours; no reference to it exists.
        unsafe { madvise(start, bytes, advice) }.unwrap();
    }

    pub(crate) fn populate_write(&self, pages: Range<u64>) {
        self.advise(pages, Advice::LinuxPopulateWrite);
    }

    pub(crate) fn protect(&self, pages: Range<u64>, protection: MprotectFlags) {
        let (start, bytes) = self.part(&pages);
        // SAFETY: the range is ours; no reference to it exists.
        unsafe { mprotect(start, bytes, protection) }.unwrap();
    }

    /// The word that lies in the memory, read by the kernel.
    pub(crate) fn word(&self, page: u64, index: u64) -> u64 {
        let mut bytes = [0; 8];
        let offset = page * PAGE_SIZE + index * 8;
        assert!(offset + 8 <= self.bytes as u64);
        std::fs::File::open("/proc/self/mem")
            .and_then(|memory| memory.read_exact_at(&mut bytes, self.hva().raw() + offset))
            .unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Puts a word into the memory, written by the kernel.
    pub(crate) fn set_word(&self, page: u64, index: u64, value: u64) {
        let offset = page * PAGE_SIZE + index * 8;
        assert!(offset + 8 <= self.bytes as u64);
        std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/mem")
            .and_then(|memory| memory.write_all_at(&value.to_ne_bytes(), self.hva().raw() + offset))
            .unwrap();
    }

    /// Leaves a hole that has no permission at all. It is not unmapped, so that nobody else is given the addresses.
    pub(crate) fn unmap(&self, pages: Range<u64>) {
        let (start, bytes) = self.part(&pages);
        // SAFETY: as in `protect`.
        unsafe {
            mmap_anonymous(start, bytes, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::FIXED).unwrap();
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and goes with us; tests drop their VMs before their memory.
        unsafe { munmap(self.start, self.bytes) }.unwrap();
    }
}

pub(crate) fn vm(profile: Profile) -> SoftVm {
    SoftVm::new(SoftConfig { profile, ..SoftConfig::default() }).unwrap()
}

pub(crate) fn vm_with(config: SoftConfig) -> SoftVm {
    SoftVm::new(config).unwrap()
}

pub(crate) fn region(slot: u32, flags: u32, gpa: u64, hva: Hva, pages: u64) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: pages * PAGE_SIZE,
        userspace_addr: hva.raw(),
    }
}

pub(crate) fn set(vm: &SoftVm, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
    // SAFETY: tests keep a slot's memory until its VM is gone, touch it by system calls only, and tell the notifier.
    unsafe { vm.set_user_memory_region(region) }
}

pub(crate) fn set2(vm: &SoftVm, region: &kvm_userspace_memory_region2) -> Result<(), Errno> {
    // SAFETY: as in `set`.
    unsafe { vm.set_user_memory_region2(region) }
}

/// Makes a slot of all of `memory` at `gpa`.
pub(crate) fn attach(vm: &SoftVm, slot: u32, flags: u32, gpa: u64, memory: &Memory) {
    set(vm, &region(slot, flags, gpa, memory.hva(), memory.pages())).unwrap();
}

pub(crate) fn detach(vm: &SoftVm, slot: u32) {
    set(vm, &region(slot, 0, 0, Hva::new(0), 0)).unwrap();
}

pub(crate) fn dirty_log(vm: &SoftVm, slot: u32, pages: u64) -> Result<Vec<u64>, Errno> {
    let mut bitmap = vec![0; usize::try_from(pages.div_ceil(64)).unwrap()];
    // SAFETY: the bitmap has a bit for each page of the slot, rounded up to 64.
    unsafe { vm.get_dirty_log(slot, &mut bitmap) }?;
    let bits = |(word, bits): (usize, u64)| {
        (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
    };
    Ok(bitmap.into_iter().enumerate().flat_map(bits).collect())
}

pub(crate) fn disable_slot_zap_quirk(vm: &SoftVm) {
    let mut cap = kvm_enable_cap { cap: 213, ..kvm_enable_cap::default() };
    cap.args[0] = 1 << 7;
    vm.enable_cap(&cap).unwrap();
}

/// Pre-faults, and gives what the ioctl gave and what it left of the range: address and pages.
pub(crate) fn pre_fault(vcpu: &mut SoftVcpu, gpa: u64, pages: u64) -> (Result<(), Errno>, u64, u64) {
    let mut range = kvm_pre_fault_memory { gpa, size: pages * PAGE_SIZE, ..Default::default() };
    let result = vcpu.pre_fault_memory(&mut range);
    (result, range.gpa, range.size / PAGE_SIZE)
}

/// Pre-faults until all is done.
#[track_caller]
pub(crate) fn pre_fault_all(vcpu: &mut SoftVcpu, gpa: u64, pages: u64) {
    let end = gpa + pages * PAGE_SIZE;
    let (mut gpa, mut pages) = (gpa, pages);
    while pages > 0 {
        let (result, next, left) = pre_fault(vcpu, gpa, pages);
        result.unwrap();
        (gpa, pages) = (next, left);
    }
    assert_eq!(gpa, end);
}

pub(crate) fn write_each(vcpu: &mut SoftVcpu, gpa: u64, pages: u64) {
    for page in 0..pages {
        vcpu.write(Gpa::new(gpa + page * PAGE_SIZE), page).unwrap();
    }
}

pub(crate) fn read_each(vcpu: &mut SoftVcpu, gpa: u64, pages: u64) {
    for page in 0..pages {
        vcpu.read(Gpa::new(gpa + page * PAGE_SIZE)).unwrap();
    }
}

#[track_caller]
pub(crate) fn stat(vcpu: &SoftVcpu, name: &str) -> u64 {
    vcpu.stats().unwrap().get(name).unwrap()
}

/// The VM's mappings: 4 KiB, 2 MiB, 1 GiB.
pub(crate) fn mapped(vm: &SoftVm) -> [u64; 3] {
    let stats = vm.stats().unwrap();
    ["pages_4k", "pages_2m", "pages_1g"].map(|name| stats.get(name).unwrap())
}
