//! A KVM that does what it likes: any errno at any call, partial, no, too much or backward progress, calls that spin or
//! take their time, and methods that panic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use premap::Stop;
use premap_kvm::abi::{kvm_enable_cap, kvm_pre_fault_memory, kvm_userspace_memory_region};
use premap_kvm::tdx::{
    TdVcpu, TdVm, TdxError, kvm_tdx_capabilities, kvm_tdx_init_mem_region, kvm_tdx_init_vm, tdx_cpuid,
};
use premap_kvm::{Errno, Result, Stats, Vcpu, Vm};
use rustix::thread::{NanosleepRelativeResult, Timespec, nanosleep};

use crate::random::Random;

pub(crate) const PAGE: u64 = 4096;
/// What a panic says that is part of the test.
pub(crate) const PANIC: &str = "a panic that is part of the test";

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Does,
    /// Does a part.
    Part,
    /// Leaves its arguments as no kernel would.
    Garbles,
    /// Says that it succeeded, and did nothing.
    Nothing,
    Refuses(Errno),
    AnyErrno,
    /// Does all, after a while.
    Sleeps,
    /// Goes on until a signal comes.
    Spins,
    Panics,
    /// Does all, and the VMM stops the run.
    Stops,
}

const TROUBLE: [Act; 14] = [
    Act::Part,
    Act::Part,
    Act::Garbles,
    Act::Nothing,
    Act::Refuses(Errno::INTR),
    Act::Refuses(Errno::AGAIN),
    Act::Refuses(Errno::BUSY),
    Act::Refuses(Errno::NOENT),
    Act::Refuses(Errno::FAULT),
    Act::Refuses(Errno::IO),
    Act::AnyErrno,
    Act::Sleeps,
    Act::Spins,
    Act::Panics,
];

/// How a case's KVM is: how often it makes trouble, and of which kinds.
#[derive(Debug)]
pub(crate) struct Kvm {
    trouble: u64,
    kinds: Vec<Act>,
    stop: Stop,
    /// Bytes that calls have claimed to map, in whole pages.
    claimed: AtomicU64,
}

impl Kvm {
    pub(crate) fn new(random: &mut Random, stop: &Stop) -> Arc<Self> {
        let trouble = random.pick(&[0, 20, 20, 100, 100, 300, 1000]);
        let mut kinds: Vec<Act> = (0..random.from(1, 4)).map(|_| random.pick(&TROUBLE)).collect();
        if random.often(30) {
            kinds.push(Act::Stops);
        }
        Arc::new(Self { trouble, kinds, stop: stop.clone(), claimed: AtomicU64::new(0) })
    }

    pub(crate) fn claimed(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed)
    }
}

/// One who calls: a vCPU, or the VM.
#[derive(Debug)]
pub(crate) struct Hostile {
    kvm: Arc<Kvm>,
    random: Random,
}

impl Hostile {
    pub(crate) fn new(kvm: &Arc<Kvm>, random: &mut Random) -> Self {
        Self { kvm: Arc::clone(kvm), random: Random::new(random.next()) }
    }

    /// How the next call ends, after what it does besides.
    fn act(&mut self) -> Act {
        let act =
            if self.random.often(self.kvm.trouble) { self.random.pick(&self.kvm.kinds) } else { Act::Does };
        match act {
            Act::Panics => std::panic::panic_any(PANIC),
            Act::Sleeps => std::thread::sleep(Duration::from_micros(self.random.below(500))),
            Act::Stops => self.kvm.stop.stop(),
            Act::Spins => {
                // A sleep that a signal interrupts, as a spin in the kernel is; std's own would go on.
                let slept = nanosleep(&Timespec { tv_sec: 3600, tv_nsec: 0 });
                assert!(!matches!(slept, NanosleepRelativeResult::Ok), "no signal came");
                return Act::Refuses(Errno::INTR);
            }
            Act::AnyErrno => {
                let errno = i32::try_from(self.random.from(1, 133)).expect("an errno");
                return Act::Refuses(Errno::from_raw_os_error(errno));
            }
            _ => {}
        }
        act
    }

    /// What a call that works on so many pages gives: how many it does, and its result.
    fn work(&mut self, pages: u64) -> (u64, Result<()>) {
        match self.act() {
            Act::Refuses(errno) => (0, Err(errno)),
            Act::Nothing => (0, Ok(())),
            // An error after progress is swallowed by Linux, but who knows.
            Act::Part => {
                let errno = self.random.often(200).then_some(Errno::FAULT);
                (self.random.from(0, pages), errno.map_or(Ok(()), Err))
            }
            _ => (pages, Ok(())),
        }
    }

    fn simple(&mut self) -> Result<()> {
        match self.act() {
            Act::Refuses(errno) => Err(errno),
            Act::Garbles => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }
}

impl Vcpu for Hostile {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
        if range.flags != 0 || range.size == 0 {
            // The probe, which no KVM spins on.
            return Err(self.random.pick(&[
                Errno::INVAL,
                Errno::INVAL,
                Errno::OPNOTSUPP,
                Errno::NOTTY,
                Errno::PERM,
            ]));
        }
        let begin = range.gpa;
        let garbled = self.kvm.kinds.contains(&Act::Garbles) && self.random.often(self.kvm.trouble);
        let (pages, mut result) = self.work(range.size / PAGE);
        let mut done = pages * PAGE;
        if garbled {
            let far = self.random.next();
            done = self.random.pick(&[1, PAGE - 1, done + 17, done + PAGE, PAGE.wrapping_neg(), far]);
            range.size = self.random.next();
            result = if self.random.often(500) { result } else { Err(Errno::FAULT) };
        } else {
            range.size -= done;
        }
        range.gpa = begin.wrapping_add(done);
        let claimed = range.gpa.saturating_sub(begin);
        self.kvm.claimed.fetch_add(claimed.min(1 << 40), Ordering::Relaxed);
        result
    }

    fn renew_root(&mut self) -> Result<()> {
        if self.random.often(900) { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn stats(&self) -> Result<Stats> {
        Err(Errno::NOTTY)
    }
}

impl TdVcpu for Hostile {
    fn tdx_init_vcpu(&mut self, _: u64) -> std::result::Result<(), TdxError> {
        // Once a launch; trouble here would leave the rest untried.
        if self.random.often(20) { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        _: u32,
    ) -> std::result::Result<(), TdxError> {
        assert!(region.source_addr.is_multiple_of(PAGE) && region.gpa.is_multiple_of(PAGE));
        assert!(region.nr_pages > 0);
        let (pages, result) = self.work(region.nr_pages);
        region.nr_pages -= pages;
        if self.kvm.kinds.contains(&Act::Garbles) && self.random.often(self.kvm.trouble) {
            region.nr_pages = self.random.next();
            region.gpa = self.random.next();
        }
        result.map_err(TdxError::from)
    }

    fn tdx_get_cpuid(&mut self, _: &mut tdx_cpuid) -> std::result::Result<(), TdxError> {
        Ok(())
    }
}

/// The VM: its methods borrow, so that each has chance of its own.
#[derive(Debug)]
pub(crate) struct HostileVm(pub(crate) std::sync::Mutex<Hostile>);

impl HostileVm {
    fn simple(&self) -> Result<()> {
        // Not under a lock that a panic would poison.
        let mut hostile = {
            let mut hostile = self.0.lock().expect("no panic under the lock");
            let kvm = Arc::clone(&hostile.kvm);
            Hostile::new(&kvm, &mut hostile.random)
        };
        hostile.simple()
    }
}

impl Vm for HostileVm {
    fn check_extension(&self, _: u32) -> Result<u32> {
        Ok(1)
    }

    fn enable_cap(&self, _: &kvm_enable_cap) -> Result<()> {
        Err(Errno::INVAL)
    }

    unsafe fn set_user_memory_region(&self, _: &kvm_userspace_memory_region) -> Result<()> {
        Err(Errno::INVAL)
    }

    unsafe fn get_dirty_log(&self, _: u32, _: &mut [u64]) -> Result<()> {
        Err(Errno::NOENT)
    }

    fn stats(&self) -> Result<Stats> {
        Ok(Stats::default())
    }
}

impl TdVm for HostileVm {
    fn tdx_capabilities(&self) -> std::result::Result<Box<kvm_tdx_capabilities>, TdxError> {
        Ok(Box::default())
    }

    fn tdx_init_vm(&self, _: &kvm_tdx_init_vm) -> std::result::Result<(), TdxError> {
        Ok(())
    }

    fn tdx_finalize_vm(&self) -> std::result::Result<(), TdxError> {
        self.simple().map_err(TdxError::from)
    }
}
