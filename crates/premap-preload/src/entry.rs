//! What a vCPU's thread does before it enters the guest: has the memory mapped, or waits until it is.
//!
//! The thread waits in place of the kernel's `KVM_RUN`, and a VMM may call it back from there by a signal. It does so from
//! here too: the run is stopped, and the call goes to the kernel in a way that does not enter the guest.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::events::Event;
use crate::helper::{Undone, attempt};
use crate::kvm::{self, Role};
use crate::phase::{End, Entry};
use crate::process::{self, Process};
use crate::run_page::RunPage;
use crate::say::say;
use crate::task::{Mapped, Notes, Task};
use crate::turn::Woken;
use crate::vms::Vm;
use crate::watch::{find, settle};

/// How long a thread waits before it looks again whether the vCPU is wanted back, by a handler that ran between two waits.
/// A handler that sets no flag, and ran then, stays unseen, so there should not be many waits.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a run's end waits for a thread that was called back and is about to leave the vCPU's page alone.
const LEAVING: Duration = Duration::from_secs(1);

/// How a vCPU's thread goes on.
#[derive(Debug)]
pub(crate) enum GoesOn {
    /// To the kernel's `KVM_RUN`.
    Enters,
    /// `KVM_RUN` must say EINTR: a signal's handler ran while the thread waited. Through the vCPU's page the kernel says so.
    CalledBack(Option<Arc<RunPage>>),
}

/// Does what comes before a `KVM_RUN`.
pub(crate) fn entering(process: &'static Process, fd: RawFd) -> GoesOn {
    let mut vms = find(process, fd, Role::Vcpu);
    while let Some(vm) = vms.of(fd, Role::Vcpu) {
        let seen = process.turn.count();
        match vm.enter(fd, Instant::now()) {
            Entry::Pass => break,
            Entry::Wait if process::stepped_aside() => break,
            Entry::Wait if vm.page(fd).is_some_and(|page| page.is_exit_wanted()) => {
                // The kernel looks at the same flag.
                vm.call_back();
                break;
            }
            Entry::Wait => {
                drop(vms);
                let woken = process.turn.wait(seen, LOOK_AGAIN);
                vms = process.vms();
                if woken == Woken::BySignal {
                    let page = vms.of(fd, Role::Vcpu).and_then(|vm| {
                        vm.call_back();
                        vm.page(fd).cloned()
                    });
                    return GoesOn::CalledBack(page);
                }
            }
            Entry::Map => {
                let (number, task) = (vm.number, task(process, vm, fd));
                drop(vms);
                begin(process, number, task);
                vms = process.vms();
            }
        }
    }
    GoesOn::Enters
}

/// Has a run begin. The thread that has it begun waits like the others.
fn begin(process: &'static Process, number: u32, task: Option<Task>) {
    let run = task.as_ref().map_or(0, |task| task.run);
    let handed = task.ok_or(Undone::Ended).and_then(|task| {
        process.mapper.hand(move |may| {
            let pages = share_pages(process, number, &task.all_vcpus);
            let done = attempt(may, || task.perform());
            ended(process, number, run, done);
            give_up(pages);
        })
    });
    if handed.is_err() {
        let mut vms = process.vms();
        if let Some(vm) = vms.numbered(number) {
            vm.timing.ended(End::Done, Instant::now());
        }
        settle(process, vms);
        if !process::stepped_aside() {
            let _ = process
                .clerk
                .hand(move |_| failed(process, number, run, "premap's threads are busy or gone"));
        }
    }
}

fn task(process: &Process, vm: &mut Vm, entering: RawFd) -> Option<Task> {
    vm.begin_run();
    Some(Task {
        settings: Arc::clone(&process.settings),
        vm: vm.number,
        run: vm.timing.runs(),
        fd: vm.fds.first().copied()?,
        vcpus: vm.lend(entering),
        all_vcpus: vm.vcpus.iter().filter_map(|vcpu| vcpu.fds.first().copied()).collect(),
        counters: vm.vcpus.iter().filter_map(|vcpu| vcpu.counters.clone()).collect(),
        slots: vm.slots.values().copied().collect(),
        before: vm.mapped.clone(),
        stop: vm.stop.clone(),
    })
}

/// Maps the pages that the vCPUs share with the VMM, for those who wait to look at.
fn share_pages(process: &Process, number: u32, vcpus: &[RawFd]) -> Vec<Arc<RunPage>> {
    let map = |fd: &RawFd| Some((*fd, Arc::new(RunPage::map(&kvm::duplicate(*fd, Role::Vcpu).ok()?).ok()?)));
    let pages: Vec<_> = vcpus.iter().filter_map(map).collect();
    let mut vms = process.vms();
    for (fd, page) in &pages {
        let vcpus = vms.numbered(number).map(|vm| &mut vm.vcpus);
        if let Some(vcpu) = vcpus.and_then(|vcpus| vcpus.iter_mut().find(|vcpu| vcpu.fds.contains(fd))) {
            vcpu.page = Some(Arc::clone(page));
        }
    }
    drop(vms);
    // Who waits looks at its page only now.
    process.turn.announce();
    pages.into_iter().map(|(_, page)| page).collect()
}

/// Unmaps the pages, here and not on a thread of the VMM's: one that was called back has its page still, for the moment
/// that the kernel takes to say EINTR.
fn give_up(pages: Vec<Arc<RunPage>>) {
    let until = Instant::now() + LEAVING;
    while pages.iter().any(|page| Arc::strong_count(page) > 1) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes note of what a run has come to, lets the vCPUs go on, and tells of it then: who reads may take his time.
fn ended(
    process: &'static Process,
    number: u32,
    run: u32,
    done: Result<Result<(Mapped, Notes), String>, Undone>,
) {
    const GIVEN_UP: &str =
        "the VMM called its vCPUs back so often that mapping got on too slowly; the rest is left to faults";
    let mut vms = process.vms();
    let mut given_up = false;
    let mut told = None;
    if let Some(vm) = vms.numbered(number) {
        let gained = match &done {
            Ok(Ok((mapped, _))) => mapped.bytes().saturating_sub(vm.mapped.bytes()),
            _ => 0,
        };
        given_up = vm.end_run(gained, Instant::now());
    }
    let done = done.map(|done| {
        done.map(|(mapped, notes)| {
            told = Some(notes);
            vms.numbered(number).into_iter().for_each(|vm| vm.mapped = mapped.clone());
        })
    });
    let step_aside = match done {
        Err(Undone::Confined) => Some(process::confined()),
        Err(Undone::MaybeConfined) => Some(process::maybe_confined()),
        Err(Undone::Panicked(ref text)) => Some(format!("an error of premap's own: {text}")),
        Ok(_) | Err(Undone::Late | Undone::Ended) => None,
    };
    let tell = move |_| {
        let _ = told.inspect(|notes| notes.tell(&process.journal));
        if let Ok(Err(error)) = done {
            failed(process, number, run, &error);
        }
        if given_up {
            process.journal.write(&Event::GivenUp { vm: number, run, why: GIVEN_UP });
            say(&format!("VM {number}: {GIVEN_UP}"));
        }
    };
    // Handed over before a vCPU may go on, so that it is told before the VM's end. This thread is for the next run.
    let tell = process.clerk.hand_or_keep(tell);
    settle(process, vms);
    // Without a clerk this thread is the last.
    tell.into_iter().for_each(|tell| tell(Ok(())));
    step_aside.into_iter().for_each(|why| process::step_aside(&why));
}

fn failed(process: &Process, vm: u32, run: u32, why: &str) {
    process.journal.write(&Event::Failed { vm, run, why });
    say(&format!("VM {vm} is not mapped: {why}"));
}
