//! What is done when descriptors of a VM's or a vCPU's are closed, in whichever of the ways there are.
//!
//! Whether one was closed is asked after the call, on the library's own thread. For the call may have been a child's that
//! shares this memory and not the descriptors (`vfork` before an `exec`, or a bare `clone`): what it closes are its own
//! copies, and the VM goes on. The library's thread sees what this process has.

use std::os::fd::RawFd;

use crate::descriptors;
use crate::kvm::{self, Role};
use crate::process;
use crate::vms::Count;
use crate::watch::{TELLING_LIMIT, once, settle, tell_ended};

/// Watched descriptors that a call is about to close.
#[derive(Debug, Default)]
pub(crate) struct Closing {
    /// Each with its VM's number.
    fds: Vec<(RawFd, u32)>,
    /// The descriptor of which a copy takes the place.
    replaced_by: Option<RawFd>,
}

/// Takes note of which descriptors are about to be closed.
pub(crate) fn before(fds: impl Iterator<Item = RawFd>, replaced_by: Option<RawFd>) -> Closing {
    once(|| {
        let Some(process) = process::current() else { return Closing::default() };
        let mut vms = process.vms();
        let number = |fd| [Role::Vm, Role::Vcpu].into_iter().find_map(|role| Some(vms.of(fd, role)?.number));
        let mut number = number;
        Closing { fds: fds.filter_map(|fd| Some((fd, number(fd)?))).collect(), replaced_by }
    })
}

/// Forgets those that are closed now.
pub(crate) fn after(closing: Closing) {
    once(|| {
        let Some(process) = process::current().filter(|_| !closing.fds.is_empty()) else { return };
        let Closing { fds, replaced_by } = closing;
        let asked = fds.clone();
        let closed = process.clerk.ask(TELLING_LIMIT, move || {
            asked.into_iter().filter(|(fd, _)| !kvm::is_open(*fd) || is_replaced(*fd, replaced_by)).collect()
        });
        // Without a thread there is nobody to tell, and nothing to be mapped any more.
        for (fd, number) in closed.unwrap_or(fds) {
            forget(process, fd, number);
        }
        let mut vms = process.vms();
        let ended = vms.take_closed();
        ended.iter().for_each(|vm| vm.stop.stop());
        settle(process, vms);
        tell_ended(process, ended);
    });
}

fn is_replaced(fd: RawFd, by: Option<RawFd>) -> bool {
    by.is_some_and(|by| kvm::same_file(fd, &[by]).is_some())
}

fn forget(process: &process::Process, fd: RawFd, number: u32) {
    let mut vms = process.vms();
    // Another thread may have made another VM by now that has the number.
    let is_same =
        [Role::Vm, Role::Vcpu].into_iter().any(|role| vms.of(fd, role).is_some_and(|vm| vm.number == number));
    if !is_same {
        return;
    }
    descriptors::forget(fd);
    if let Some((number, vcpu)) = vms.forget(fd) {
        drop(vms);
        let counters = vcpu.counters;
        let read = move || counters.map(|counters| Count::read(&counters));
        let count = process.clerk.ask(TELLING_LIMIT, read).ok().flatten();
        if let Some(vm) = process.vms().numbered(number) {
            vm.count = vm.count.plus(count.unwrap_or_default());
        }
    }
}
