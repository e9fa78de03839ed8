//! What a guest gives back while its memory is being mapped stays given back.
// UNSAFETY: mmap, madvise and munmap of memory that nothing refers to.
#![expect(unsafe_code, reason = "maps memory to populate and discard it")]

use std::ffi::c_void;
use std::num::NonZeroU64;
use std::time::Duration;

use premap::{Backing, Engine, Gate, Gpa, GpaRange, Hva, Pace, Plan, Region, Stages, Touch};
use premap_kvm::abi::kvm_pre_fault_memory;
use premap_kvm::{Stats, Vcpu};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const PAGE: usize = 4096;
const PAGES: usize = 512;
const CHUNK: usize = 16;

/// Maps whatever it is asked for: what the host has is looked at afterwards.
struct Willing;

impl Vcpu for Willing {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> premap_kvm::Result<()> {
        (range.gpa, range.size) = (range.gpa + range.size, 0);
        Ok(())
    }

    fn renew_root(&mut self) -> premap_kvm::Result<()> {
        Ok(())
    }

    fn stats(&self) -> premap_kvm::Result<Stats> {
        Ok(Stats::default())
    }
}

/// The guest's memory.
struct Memory(*mut c_void);

impl Memory {
    fn new() -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        Self(unsafe {
            let base = mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, protection, MapFlags::PRIVATE);
            let base = base.expect("the memory can be had");
            madvise(base, PAGES * PAGE, Advice::LinuxNoHugepage).expect("huge pages can be forgone");
            base
        })
    }

    fn discard(&self, first: usize, pages: usize) {
        // SAFETY: within the mapping, to which there is no reference.
        unsafe { madvise(self.0.byte_add(first * PAGE), pages * PAGE, Advice::LinuxDontNeed) }
            .expect("own memory");
    }

    /// Which pages are there.
    fn present(&self) -> Vec<bool> {
        let mut present = [0_u8; PAGES];
        // SAFETY: the vector has a byte for each page of the mapping.
        let result = unsafe { libc::mincore(self.0, PAGES * PAGE, present.as_mut_ptr()) };
        assert_eq!(result, 0);
        present.iter().map(|page| page & 1 == 1).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it.
        unsafe { munmap(self.0, PAGES * PAGE) }.expect("an own mapping can be unmapped");
    }
}

fn range(first: usize, pages: usize) -> GpaRange {
    GpaRange::new(Gpa::new((first * PAGE) as u64), (pages * PAGE) as u64)
}

#[test]
fn what_the_guest_gave_back_is_not_filled_again() {
    for stages in [Stages::Both, Stages::Host] {
        let memory = Memory::new();
        let host = Hva::new(memory.0.expose_provenance() as u64);
        let whole = Region { range: range(0, PAGES), host, backing: Backing::Anonymous, touch: Touch::Write };
        let plan =
            Plan::new([whole]).and_then(|plan| plan.with_chunk((CHUNK * PAGE) as u64)).expect("aligned");
        // 32 chunks in some 160 ms, so that what is given back is part of what is mapped already and part of what is not.
        let pace = Pace::BytesPerSecond(NonZeroU64::new((200 * CHUNK * PAGE) as u64).expect("not zero"));
        let gate = Gate::new();
        let engine = Engine::new().stages(stages).pace(pace).gate(&gate);
        let run = engine.background(plan, vec![Willing]).expect("threads can be had");
        while run.progress().host < (4 * CHUNK * PAGE) as u64 {
            std::thread::sleep(Duration::from_micros(100));
        }
        let given_back = [(8, 40), (100, 1), (102, 1), (300, 212)];
        for (first, pages) in given_back {
            let guard = gate.close();
            guard.forget(range(first, pages));
            memory.discard(first, pages);
            drop(guard);
        }
        let report = run.join().expect("threads can be had");
        assert_eq!(report.host.bytes(), report.asked, "{report:?}");
        let gone = |page| given_back.iter().any(|(first, pages)| (*first..first + pages).contains(&page));
        for (page, present) in memory.present().into_iter().enumerate() {
            assert_eq!(present, !gone(page), "page {page}, {stages:?}: {report:?}");
        }
    }
}
