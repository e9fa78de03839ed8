//! Launching a TD on a KVM that is a script: which calls it gets, in which order, and what comes of its refusals.
#![cfg(feature = "td")]
// UNSAFETY: implements a trait with unsafe methods; none is called.
#![expect(unsafe_code, reason = "the trait's methods are unsafe to call")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use premap::td::{Launch, LaunchError, LaunchReport, Phase, Piece};
use premap::{Gpa, GpaRange, Reason, Stop, Unsupported};
use premap_kvm::abi::{kvm_enable_cap, kvm_pre_fault_memory, kvm_userspace_memory_region};
use premap_kvm::tdx::{
    TdVcpu, TdVm, TdxError, kvm_tdx_capabilities, kvm_tdx_init_mem_region, kvm_tdx_init_vm, tdx_cpuid,
};
use premap_kvm::{Errno, Result, Stats, Vcpu, Vm};

const PAGE: u64 = 4096;

/// Whether memory can be pre-faulted before the TD is finalized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kernel {
    /// As the proposal has it: then each page must be, before it is added.
    #[default]
    Reserves,
    /// As Linux has it since 6.16.
    Refuses,
}

#[derive(Debug, Default)]
struct State {
    kernel: Kernel,
    initialised: Vec<(u32, u64)>,
    reserved: BTreeMap<u64, bool>,
    /// First byte and whether measured, in the order of adding.
    added: Vec<(u64, u8, bool)>,
    finalized: bool,
    mapped: Vec<u64>,
    /// What the next calls that add give instead.
    trouble: Vec<TdxError>,
    /// What the next calls that finalize give instead.
    last_trouble: Vec<TdxError>,
}

/// What a call gives that spins until a signal comes: it ends with EINTR.
const SPIN: Errno = Errno::XFULL;

fn suffer(error: TdxError) -> TdxError {
    if error.errno != SPIN {
        return error;
    }
    // A sleep that a signal interrupts, as a spin in the kernel is; std's own would go on.
    let hour = rustix::thread::Timespec { tv_sec: 3600, tv_nsec: 0 };
    let slept = rustix::thread::nanosleep(&hour);
    assert!(!matches!(slept, rustix::thread::NanosleepRelativeResult::Ok), "no signal came");
    Errno::INTR.into()
}

#[derive(Clone, Debug, Default)]
struct Td(Arc<Mutex<State>>);

impl Td {
    fn new(kernel: Kernel) -> Self {
        Self(Arc::new(Mutex::new(State { kernel, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    fn vcpus(&self, count: u32) -> Vec<TdCpu> {
        (0..count).map(|id| TdCpu { id, td: self.clone() }).collect()
    }
}

impl Vm for Td {
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
        Err(Errno::NOTTY)
    }
}

impl TdVm for Td {
    fn tdx_capabilities(&self) -> std::result::Result<Box<kvm_tdx_capabilities>, TdxError> {
        Ok(Box::default())
    }

    fn tdx_init_vm(&self, _: &kvm_tdx_init_vm) -> std::result::Result<(), TdxError> {
        Ok(())
    }

    fn tdx_finalize_vm(&self) -> std::result::Result<(), TdxError> {
        let mut state = self.state();
        if let Some(error) = state.last_trouble.pop() {
            drop(state);
            return Err(suffer(error));
        }
        if state.finalized || state.reserved.values().any(|used| !used) {
            return Err(Errno::INVAL.into());
        }
        state.finalized = true;
        Ok(())
    }
}

struct TdCpu {
    id: u32,
    td: Td,
}

impl Vcpu for TdCpu {
    fn pre_fault_memory(&mut self, range: &mut kvm_pre_fault_memory) -> Result<()> {
        let mut state = self.td.state();
        if range.size == 0 {
            return Err(Errno::INVAL);
        }
        if !state.finalized && state.kernel == Kernel::Refuses {
            return Err(Errno::OPNOTSUPP);
        }
        let pages = (range.gpa..range.gpa + range.size).step_by(4096);
        if state.finalized {
            state.mapped.extend(pages)
        } else {
            state.reserved.extend(pages.map(|gpa| (gpa, false)))
        }
        range.gpa += range.size;
        range.size = 0;
        Ok(())
    }

    fn renew_root(&mut self) -> Result<()> {
        Err(Errno::INVAL)
    }

    fn stats(&self) -> Result<Stats> {
        Err(Errno::NOTTY)
    }
}

impl TdVcpu for TdCpu {
    fn tdx_init_vcpu(&mut self, rcx: u64) -> std::result::Result<(), TdxError> {
        self.td.state().initialised.push((self.id, rcx));
        Ok(())
    }

    fn tdx_init_mem_region(
        &mut self,
        region: &mut kvm_tdx_init_mem_region,
        flags: u32,
    ) -> std::result::Result<(), TdxError> {
        let mut state = self.td.state();
        assert!(region.source_addr.is_multiple_of(PAGE));
        while region.nr_pages > 0 {
            if state.added.len() % 3 == 2
                && let Some(error) = state.trouble.pop()
            {
                drop(state);
                return Err(suffer(error));
            }
            if state.kernel == Kernel::Reserves && state.reserved.insert(region.gpa, true) != Some(false) {
                return Err(Errno::IO.into());
            }
            let byte = first_byte(region.source_addr);
            state.added.push((region.gpa, byte, flags == 1));
            region.gpa += PAGE;
            region.source_addr += PAGE;
            region.nr_pages -= 1;
        }
        Ok(())
    }

    fn tdx_get_cpuid(&mut self, _: &mut tdx_cpuid) -> std::result::Result<(), TdxError> {
        Err(Errno::INVAL.into())
    }
}

/// Reads the source as a kernel would.
fn first_byte(address: u64) -> u8 {
    use std::os::unix::fs::FileExt;
    let mut byte = [0];
    let memory = std::fs::File::open("/proc/self/mem").expect("Linux has it");
    memory.read_exact_at(&mut byte, address).expect("the source is mapped");
    byte[0]
}

fn range(first: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(first * PAGE), pages * PAGE)
}

fn pieces() -> Vec<Piece<'static>> {
    let content = |pages: u64, byte: u8| vec![byte; usize::try_from(pages * PAGE).expect("small")].into();
    vec![
        Piece { range: range(100, 4), content: content(4, 7), measured: true },
        Piece { range: range(10, 2), content: content(1, 9), measured: false },
    ]
}

fn launch(td: &Td, vcpus: u32) -> std::result::Result<LaunchReport, LaunchError> {
    Launch::new(pieces(), 0x80_9000)?.map_rest([range(0, 32)]).run(td, &mut td.vcpus(vcpus))
}

fn expected() -> Vec<(u64, u8, bool)> {
    let measured = (100..104).map(|page| (page * PAGE, 7, true));
    measured.chain([(10 * PAGE, 9, false), (11 * PAGE, 0, false)]).collect()
}

#[test]
fn pages_are_added_in_order_whatever_the_kernel_reserves() {
    for kernel in [Kernel::Reserves, Kernel::Refuses] {
        let td = Td::new(kernel);
        let report = launch(&td, 3).unwrap();
        let mut state = td.state();
        assert_eq!(state.initialised, [(0, 0x80_9000), (1, 0x80_9000), (2, 0x80_9000)]);
        assert_eq!(state.added, expected(), "{kernel:?}");
        assert!(state.finalized);
        state.mapped.sort_unstable();
        let rest: Vec<u64> = (0..10).chain(12..32).map(|page| page * PAGE).collect();
        assert_eq!(state.mapped, rest, "what no piece holds, once");
        let phases: Vec<_> = report.phases.iter().map(|phase| (phase.phase, phase.bytes / PAGE)).collect();
        let reserved = if kernel == Kernel::Reserves { 6 } else { 0 };
        assert_eq!(
            phases,
            [
                (Phase::InitVcpus, 0),
                (Phase::Reserve, reserved),
                (Phase::Add, 6),
                (Phase::Finalize, 0),
                (Phase::MapRest, 30)
            ]
        );
        let unsupported = (kernel == Kernel::Refuses).then_some(Unsupported::VcpuState);
        assert_eq!(report.reserve.second.unsupported, unsupported);
    }
}

#[test]
fn a_busy_module_and_signals_are_waited_out() {
    let td = Td::new(Kernel::Refuses);
    let busy = TdxError { errno: Errno::BUSY, hw_error: 0x8000_0200_0000_0092 };
    td.state().trouble = vec![busy, Errno::INTR.into(), busy];
    launch(&td, 1).unwrap();
    assert_eq!(td.state().added, expected());
    assert!(td.state().trouble.is_empty());
}

#[test]
fn retries_end_with_patience_and_a_call_that_spins_is_interrupted() {
    const MANY: usize = 1_000_000;
    let many = |error: TdxError| vec![error; MANY];
    let busy = TdxError { errno: Errno::BUSY, hw_error: 0x8000_0200_0000_0092 };
    for (trouble, why) in [
        (many(Errno::INTR.into()), Reason::NoProgress),
        (many(busy), Reason::Busy),
        (many(Errno::AGAIN.into()), Reason::Busy),
        (many(SPIN.into()), Reason::NoProgress),
    ] {
        for phase in [Phase::Add, Phase::Finalize] {
            let td = Td::new(Kernel::Refuses);
            match phase {
                Phase::Add => td.state().trouble = trouble.clone(),
                _ => td.state().last_trouble = trouble.clone(),
            }
            let launch = Launch::new(pieces(), 0).unwrap().patience(Duration::from_millis(20));
            let error = launch.run(&td, &mut td.vcpus(1)).unwrap_err();
            assert!(matches!(error, LaunchError::Ended(ended) if ended == why), "{phase}: {error}");
            let state = td.state();
            let calls = MANY - state.trouble.len().max(state.last_trouble.len());
            assert!(calls < 2000, "{calls} calls while {phase}");
        }
    }
}

#[test]
fn a_refusal_names_the_page_and_what_the_module_said() {
    let td = Td::new(Kernel::Refuses);
    td.state().trouble = vec![TdxError { errno: Errno::IO, hw_error: 0xc000_0b0d_0000_0001 }];
    let error = launch(&td, 1).unwrap_err();
    assert!(matches!(error, LaunchError::NotAdded { gpa: 0x6_6000, .. }), "{error}");
    assert!(
        error.to_string().contains("0x66000") && error.to_string().contains("0xc0000b0d00000001"),
        "{error}"
    );
    assert!(!td.state().finalized);
}

#[test]
fn without_reserving_a_kernel_that_wants_it_refuses_the_first_page() {
    let td = Td::new(Kernel::Reserves);
    let launch = Launch::new(pieces(), 0).unwrap().without_reserving();
    let error = launch.run(&td, &mut td.vcpus(1)).unwrap_err();
    assert!(matches!(error, LaunchError::NotAdded { gpa: 0x6_4000, .. }), "{error}");
}

#[test]
fn a_stop_ends_it_and_no_vcpu_can_t_begin_it() {
    let td = Td::new(Kernel::Refuses);
    let stop = Stop::new();
    stop.stop();
    let launch = Launch::new(pieces(), 0).unwrap().stop(&stop);
    let error = launch.run(&td, &mut td.vcpus(1)).unwrap_err();
    assert!(matches!(error, LaunchError::Ended(Reason::Stopped)), "{error}");
    assert!(!td.state().finalized);
    assert!(matches!(Launch::new(pieces(), 0).unwrap().run(&td, &mut td.vcpus(0)), Err(LaunchError::NoVcpu)));
}
