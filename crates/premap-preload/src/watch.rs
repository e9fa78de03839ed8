//! What is done before and after the VMM's calls.
//!
//! Lock order: there is one lock, the VMs', and nothing that may wait for another thread is done under it. A thread that
//! is in here already, and comes again from a signal handler, passes.
// UNSAFETY: reads the struct that a call's argument points to, after the kernel has read it.
#![expect(unsafe_code, reason = "the argument of an ioctl that succeeded")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use premap_exec_settings::Strategy;
use premap_kvm::abi::kvm_userspace_memory_region;

use crate::absence;
use crate::descriptors;
use crate::entry::{self, GoesOn};
use crate::events::Event;
use crate::kvm::{self, Counters, Role};
use crate::memory::Slot;
use crate::phase::{Change, Timing};
use crate::process::{self, Process};
use crate::request::Request;
use crate::run_page::RunPage;
use crate::say::say;
use crate::vms::{Count, Vm, Vms};

/// Whether any VM's entries must be asked about. `KVM_RUN` looks at nothing else.
static DUE: AtomicBool = AtomicBool::new(false);

/// How long something that is only told may hold the VMM up.
pub(crate) const TELLING_LIMIT: Duration = Duration::from_secs(2);
/// How long the process's exit waits for the run under way to end and be told: it was stopped.
const LAST_RUN_LIMIT: Duration = Duration::from_millis(100);
/// How long a thread waits before it looks again whether the library has stepped aside.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What `before` has to tell `after`.
#[derive(Debug, Default)]
pub(crate) enum Before {
    #[default]
    Nothing,
    /// A slot of the VM of this number is about to change.
    Changing(u32),
    /// A userfaultfd handler is about to take memory over, which may be any of these VMs'.
    Registering(Vec<u32>),
    /// A vCPU was called back while it waited to enter: the call says EINTR, by the kernel where its page is at hand.
    CalledBack(Option<Arc<RunPage>>),
}

/// Whether an entry to the guest must be asked about.
pub(crate) fn is_mapping_due() -> bool {
    DUE.load(Ordering::Relaxed)
}

/// Does what comes before a call.
pub(crate) fn before(request: Request, fd: RawFd) -> Before {
    once(|| match request {
        Request::Begin | Request::CreateVm => {
            process::begin();
            Before::Nothing
        }
        Request::CreateVcpu => Before::Nothing,
        Request::SetRegion => process::current().map_or(Before::Nothing, |process| changing(process, fd)),
        Request::RegisterUserfault => process::current().map_or(Before::Nothing, registering),
        Request::Run => match process::current().map(|process| entry::entering(process, fd)) {
            Some(GoesOn::CalledBack(page)) => Before::CalledBack(page),
            Some(GoesOn::Enters) => Before::Nothing,
            None => {
                // A child: what was due was its parent's.
                DUE.store(false, Ordering::Relaxed);
                Before::Nothing
            }
        },
    })
}

/// Does what comes after a call. Where `value` says that it succeeded, `argument` is valid for it.
pub(crate) fn after(before: Before, request: Request, fd: RawFd, value: c_int, argument: *mut c_void) {
    once(|| {
        let Some(process) = process::current() else { return };
        match request {
            Request::CreateVm if value >= 0 => created_vm(process, value, argument.addr()),
            Request::CreateVcpu if value >= 0 => created_vcpu(process, fd, value),
            Request::RegisterUserfault => {
                if let Before::Registering(numbers) = before {
                    registered(process, &numbers);
                }
            }
            Request::SetRegion => {
                if let Before::Changing(vm) = before {
                    // SAFETY: the kernel has read a struct that begins with these fields from there, just now.
                    let region = (value == 0)
                        .then(|| unsafe { argument.cast::<kvm_userspace_memory_region>().read_unaligned() });
                    changed(process, vm, region);
                }
            }
            _ => {}
        }
    });
}

/// Gives the library's threads up, since the VMM could not start one of its own. What they do ends soon.
pub(crate) fn give_threads_up() {
    once(|| {
        process::given_up();
        process::step_aside("this process may have no more threads, and the VMM needs those that premap had");
    });
}

/// Whether there are no more threads to be had. A `KVM_RUN` that says EAGAIN may mean that: at a VM's first one the kernel
/// starts a thread for it. It mostly means something else.
pub(crate) fn is_short_of_threads() -> bool {
    once(|| {
        let start = || std::thread::Builder::new().spawn(|| ()).is_err();
        process::current().is_some_and(|process| process.clerk.ask(TELLING_LIMIT, start) == Ok(true))
    })
}

/// Whether the calling thread is at work for the library, inside a call of the VMM's.
pub(crate) fn is_inside() -> bool {
    INSIDE.get()
}

/// Does what comes at the process's exit.
pub(crate) fn exiting() {
    once(|| {
        let Some(process) = process::current() else { return };
        if !process::stepped_aside() {
            process.vms().stop_all();
            process.mapper.close();
            process.mapper.wait_for_end(LAST_RUN_LIMIT);
            let mut vms = process.vms();
            let all = vms.take_all();
            settle(process, vms);
            tell_ended(process, all);
        }
        // What was said is on its way.
        process.clerk.close();
        process.clerk.wait_for_end(TELLING_LIMIT);
    });
}

pub(crate) fn once<T: Default>(work: impl FnOnce() -> T) -> T {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            INSIDE.set(false);
        }
    }
    if INSIDE.replace(true) {
        return T::default();
    }
    let _leave = Leave;
    work()
}

fn created_vm(process: &'static Process, fd: RawFd, machine_type: usize) {
    absence::made();
    // A child that shares this memory, but not the descriptors, may have made it for itself. Then this process has no VM of
    // that number, or another one; only in the second case, which is rare, is a system call risked here.
    let here =
        process.clerk.ask(TELLING_LIMIT, move || (kvm::duplicate(fd, Role::Vm).is_ok(), std::process::id()));
    let is_known = process.vms().of(fd, Role::Vm).is_some();
    if here.is_ok_and(|(is_open, id)| !is_open || is_known && id != std::process::id()) {
        return;
    }
    // On x86 a VM of another type than the default has memory that its launch maps; it is only looked at. Elsewhere the
    // type has the width of guest addresses.
    let by_launch = cfg!(target_arch = "x86_64") && machine_type != 0;
    let timing = match process.settings.strategy {
        Strategy::None => Timing::never(),
        _ if by_launch => Timing::never(),
        _ => Timing::new(Duration::from_nanos(process.settings.follow_ns)),
    };
    descriptors::watch(fd);
    let mut vms = process.vms();
    let has_runs = timing.is_due();
    vms.add(fd, timing);
    settle(process, vms);
    if has_runs {
        // Now that it is needed, it stays.
        process.wake_mapper();
    }
}

fn created_vcpu(process: &Process, vm_fd: RawFd, fd: RawFd) {
    let counters = process.journal.is_open().then(|| {
        let opened = process.clerk.ask(TELLING_LIMIT, move || {
            kvm::duplicate(fd, Role::Vcpu).and_then(Counters::open).ok().map(Arc::new)
        });
        opened.ok().flatten()
    });
    let mut vms = find(process, vm_fd, Role::Vm);
    if let Some(number) = vms.of(vm_fd, Role::Vm).map(|vm| vm.number) {
        descriptors::watch(fd);
        vms.add_vcpu(number, fd, counters.flatten());
    }
}

fn changing(process: &Process, fd: RawFd) -> Before {
    let mut vms = find(process, fd, Role::Vm);
    let Some(vm) = vms.of(fd, Role::Vm) else { return Before::Nothing };
    let number = vm.number;
    vm.timing.changing();
    wait_for_end(process, vms, number);
    Before::Changing(number)
}

/// No run may be under way while a handler takes memory over: populating such memory does not end until the handler gives
/// it. The next run sees whose it is.
fn registering(process: &Process) -> Before {
    let mut vms = process.vms();
    let numbers = vms.numbers();
    for number in &numbers {
        if let Some(vm) = vms.numbered(*number) {
            vm.timing.changing();
        }
    }
    drop(vms);
    numbers.iter().for_each(|number| wait_for_end(process, process.vms(), *number));
    Before::Registering(numbers)
}

fn registered(process: &Process, numbers: &[u32]) {
    let mut vms = process.vms();
    for number in numbers {
        if let Some(vm) = vms.numbered(*number) {
            vm.timing.changed(Change::Nothing, Instant::now());
        }
    }
    settle(process, vms);
}

/// Stops a VM's run, if one is under way, and waits until it has ended.
///
/// The kernel would keep a change of slots waiting until the call under way has ended, and before 6.18 that call might
/// not end.
fn wait_for_end<'a>(process: &'a Process, mut vms: MutexGuard<'a, Vms>, number: u32) {
    loop {
        let seen = process.turn.count();
        match vms.numbered(number) {
            Some(vm) if vm.timing.is_mapping() && !process::stepped_aside() => vm.stop.stop(),
            _ => return,
        }
        drop(vms);
        process.turn.wait(seen, LOOK_AGAIN);
        vms = process.vms();
    }
}

fn changed(process: &Process, number: u32, region: Option<kvm_userspace_memory_region>) {
    let mut vms = process.vms();
    if let Some(vm) = vms.numbered(number) {
        let moved = region.is_some_and(|region| {
            vm.set(Slot {
                slot: region.slot,
                flags: region.flags,
                gpa: region.guest_phys_addr,
                bytes: region.memory_size,
                host: region.userspace_addr,
            })
        });
        vm.timing.changed(if moved { Change::Slots } else { Change::Nothing }, Instant::now());
    }
    settle(process, vms);
}

/// The VMs, with `fd` among their descriptors if it is a duplicate of one that is known.
pub(crate) fn find(process: &Process, fd: RawFd, role: Role) -> MutexGuard<'_, Vms> {
    let mut vms = process.vms();
    let candidates = vms.fds(role);
    if vms.of(fd, role).is_some() || candidates.is_empty() {
        return vms;
    }
    drop(vms);
    let same = process.clerk.ask(TELLING_LIMIT, move || {
        kvm::duplicate(fd, role).ok()?;
        kvm::same_file(fd, &candidates)
    });
    vms = process.vms();
    if let Ok(Some(original)) = same {
        descriptors::watch(fd);
        vms.alias(original, fd);
    }
    vms
}

/// Publishes what is due after a change, and wakes who waits.
pub(crate) fn settle(process: &Process, vms: MutexGuard<'_, Vms>) {
    DUE.store(vms.is_due(), Ordering::Relaxed);
    drop(vms);
    process.turn.announce();
}

pub(crate) fn tell_ended(process: &Process, ended: Vec<Vm>) {
    if ended.is_empty() || !process.journal.is_open() {
        return;
    }
    let journal = Arc::clone(&process.journal);
    let told = process.clerk.ask(TELLING_LIMIT, move || {
        for vm in &ended {
            let open = vm.vcpus.iter().filter_map(|vcpu| vcpu.counters.as_deref()).map(Count::read);
            let count = open.fold(vm.count, Count::plus);
            journal.write(&Event::Ended {
                vm: vm.number,
                runs: vm.timing.runs(),
                vcpus: vm.vcpus_made,
                account: vm.mapped.account,
                faults: count.faults,
                exits: count.exits,
            });
        }
    });
    if let Err(undone) = told {
        say(&format!("the report has no end: {undone:?}"));
    }
}
